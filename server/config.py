"""Configuration of the federation: rounds, cohorts, assignment of experts, aggregation."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from model.config import Frozen
from server.aggregation_config import AggregationConfig, Mean
from server.optimizer_config import ServerOptimizerConfig, ServerSgd


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


class FederationConfig(Frozen):
    """How rounds run.

    experts_per_node: routed experts per layer that travel to a node (capped by what the node declares).
    assignment: ``all``, ``random``, or ``balanced`` (every expert gets its minimum holders first).
    min_holders: an expert that fewer nodes returned keeps its value.
    weights: average deltas uniformly or by declared size.
    aggregation: how the deltas of a tensor's holders become one.
    step_scale: ``contributions`` shortens the step of an expert that fewer nodes returned than could be expected.
    min_replies: a round with fewer acceptable replies changes nothing.
    """

    rounds: int = Field(ge=1, le=1_000_000)
    experts_per_node: int = Field(ge=1)
    assignment: Literal["all", "random", "balanced"] = "balanced"
    min_holders: int = Field(default=1, ge=1)
    weights: Literal["declared", "uniform"] = "declared"
    cohort: CohortConfig = AllNodes()
    optimizer: ServerOptimizerConfig = ServerSgd()
    reply_timeout_s: float = Field(default=3600.0, gt=0.0)
    aggregation: AggregationConfig = Mean()
    step_scale: Literal["none", "contributions"] = "none"
    min_replies: int = Field(default=1, ge=1)

    younger: ClassVar[frozenset[str]] = frozenset({"aggregation", "step_scale", "min_replies"})

    @field_validator("optimizer", mode="before")
    @classmethod
    def _sgd_where_no_kind_is_named(cls, value: Any) -> Any:
        return {"kind": "sgd"} | value if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _fits_together(self) -> FederationConfig:
        if self.optimizer.warmup_rounds >= self.rounds:
            raise ValueError(
                f"optimizer.warmup_rounds is {self.optimizer.warmup_rounds}, must be less than rounds {self.rounds}"
            )
        if isinstance(self.cohort, FixedCohort) and self.min_replies > self.cohort.size:
            raise ValueError(f"min_replies is {self.min_replies}, must be at most cohort.size {self.cohort.size}")
        return self
