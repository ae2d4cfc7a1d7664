"""Configuration of who takes part, and of what nodes choose."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from conclave.base.frozen import Frozen


class FixedCohort(Frozen):
    """Every round, ``size`` nodes drawn without replacement (all of them if there are fewer)."""

    kind: Literal["fixed"]
    size: int = Field(ge=1)


class PoissonCohort(Frozen):
    """Every round, each node independently with probability ``rate``; a round may find nobody."""

    kind: Literal["poisson"]
    rate: float = Field(gt=0.0, le=1.0)


class AllNodes(Frozen):
    """Every node, every round."""

    kind: Literal["all"] = "all"


CohortConfig = Annotated[AllNodes | FixedCohort | PoissonCohort, Field(discriminator="kind")]


class ChoiceConfig(Frozen):
    """Nodes choose their experts every ``every`` rounds, each choice at ``epsilon``, by the exponential mechanism."""

    epsilon: float = Field(gt=0.0, le=10.0)
    every: int = Field(ge=1, le=1_000_000)
