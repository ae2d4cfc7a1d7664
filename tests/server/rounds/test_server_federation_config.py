"""Configuration of rounds: what does not fit together is refused in one sentence."""

from __future__ import annotations

import pytest

from conclave.base.errors import BadInputError
from conclave.server.scenario import read_scenario
from conclave.simulations.shipped import find


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"federation.min_replies": 11}, "federation.min_replies is 11, must be at most partition.nodes 10"),
        (
            {"federation.min_replies": 3, "federation.cohort": {"kind": "fixed", "size": 2}},
            "federation: min_replies is 3, must be at most cohort.size 2",
        ),
        (
            {"federation.optimizer.warmup_rounds": 60},
            "federation: optimizer.warmup_rounds is 60, must be less than rounds 60",
        ),
        (
            {"federation.aggregation": {"kind": "mode"}},
            "federation.aggregation.kind is 'mode', must be one of mean, median, norm-bounded, trimmed-mean",
        ),
        (
            {"federation.aggregation.trim": 0.5, "federation.aggregation.kind": "trimmed-mean"},
            "federation.aggregation.trim",
        ),
        ({"federation.optimizer.kind": "lion"}, "federation.optimizer.kind is 'lion', must be one of"),
        ({"federation.optimizer.momentum": 0.5, "federation.optimizer.kind": "adam"}, "federation.optimizer.momentum"),
    ],
)
def test_what_does_not_fit_is_one_sentence(changes, sentence):
    with pytest.raises(BadInputError) as caught:
        read_scenario(find("digits"), changes)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_override_picks_another_optimizer():
    scenario = read_scenario(find("digits"), {"federation.optimizer.kind": "adagrad"})
    assert scenario.federation.optimizer.kind == "adagrad"
    assert scenario.federation.optimizer.decay == 0.8
