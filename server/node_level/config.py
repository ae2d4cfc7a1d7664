"""Configuration of the node as the unit."""

from __future__ import annotations

from pydantic import Field

from conclave.base.frozen import Frozen


class NodePrivacyConfig(Frozen):
    """The node as the unit, protected by a trusted server in addition to what every node does for its records.

    (epsilon, delta) holds for the model after every round, under add or remove of one node with all that it ever sends.
    clip: bound of a node's joint delta of one round, L2; longer ones are scaled down.
    nodes: the public number of nodes that divisors are made of; how many there are is protected.
    """

    epsilon: float = Field(gt=0.0, le=1e6)
    delta: float = Field(gt=0.0, lt=1.0)
    clip: float = Field(gt=0.0, le=1e6)
    nodes: int = Field(ge=1, le=10_000_000)
