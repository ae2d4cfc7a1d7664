"""Whether the nodes that are there can give every expert its holders, told before any budget is set aside."""

from __future__ import annotations

from collections import Counter

import pytest
from server_samples import SmallFederation

from conclave.base.errors import RunFailedError
from conclave.server.failures import check_coverage
from conclave.server.node_level.config import NodePrivacyConfig
from conclave.server.scenario import Scenario


def test_a_run_whose_nodes_have_too_little_room_is_refused():
    federation = SmallFederation(nodes=4, min_holders=2)  # 4 × 3 places for 6 × 2
    scenario = Scenario.model_construct(
        model=federation.plan.model, federation=federation.terms.federation, node_privacy=None
    )
    check_coverage(scenario, federation.nodes, Counter())
    few = {flower_id: federation.nodes[flower_id] for flower_id in (11, 12, 13)}
    sentence = "3 nodes × 3 experts hold 9 places, 6 experts × min_holders 2 need 12"
    with pytest.raises(RunFailedError, match=f"{sentence}$"):
        check_coverage(scenario, few, Counter())
    with pytest.raises(RunFailedError, match=f"{sentence}; nodes that do not take part: 1 × paused$"):
        check_coverage(scenario, few, Counter({"paused": 1}))
    level = NodePrivacyConfig(epsilon=8.0, delta=1e-3, clip=1.0, nodes=4)
    check_coverage(scenario.model_copy(update={"node_privacy": level}), few, Counter())  # who is there must not show
