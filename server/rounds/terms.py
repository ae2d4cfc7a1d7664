"""What the rounds of a run go by, and what they keep of what nodes released."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from conclave.protocol.messages import Description
from conclave.protocol.plan import Plan
from conclave.server.aggregate.balancing import BalancingConfig
from conclave.server.assign.choices import Choices
from conclave.server.node_level.rounds import NodeLevelRounds
from conclave.server.replies.receipts import ReceiptBook
from conclave.server.rounds.config import FederationConfig

Nodes = Mapping[int, Description]
"""The nodes that are there: Flower node id → what the node said about itself. Their fingerprints are distinct."""


@dataclass(frozen=True)
class Terms:
    """What all rounds of a run have in common: fixed before the first, and public.

    scenario: its name, which nodes may allow or not.
    balancing: how selection biases follow the loads that nodes release; the plan asks for them.
    """

    run_id: str
    scenario: str
    seed: int
    plan: Plan
    federation: FederationConfig
    balancing: BalancingConfig | None = None


@dataclass(frozen=True)
class Books:
    """What a run keeps of what nodes released, besides the model. Each has its own file and survives a restart.

    receipts: heads of nodes' ledgers.
    choices: what nodes chose, where they do.
    node_level: where the node is the unit: draws cohorts, and makes of the replies what may be published.
    """

    receipts: ReceiptBook
    choices: Choices | None = None
    node_level: NodeLevelRounds | None = None
