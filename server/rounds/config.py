"""Configuration of the federation: rounds, cohorts, assignment of experts, aggregation, evaluation by nodes."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from conclave.base.frozen import Frozen
from conclave.protocol.plan import EvaluationSchedule
from conclave.server.aggregate.config import (
    AggregationConfig,
    AverageConfig,
    Mean,
    NoAverage,
    ServerOptimizerConfig,
    ServerSgd,
)
from conclave.server.assign.config import AllNodes, CohortConfig, FixedCohort
from conclave.server.replies.config import NoiseTestConfig


class FederationConfig(Frozen):
    """How rounds run.

    experts_per_node: routed experts per layer that travel to a node (capped by what the node declares).
    assignment: ``all``, ``random``, ``balanced`` (holders as even as capacities allow, new ones every round) or
        ``sticky`` (a node keeps its experts while every expert has ``min_holders``), see
        :mod:`conclave.server.assign.assignment`; ``affinity`` follows what nodes chose by ``[affinity]``, and is
        balanced before they did.
    min_holders: an expert that fewer nodes returned keeps its value. A federation without the places for that many
        holders of every expert in a round is refused; with 0, a round may pass over experts.
    weights: average deltas uniformly or by declared size.
    expert_scope: ``federated`` averages experts over their holders; ``local`` leaves each node its own, always: only
        router and shared weights travel; ``mixed`` does so for ``local_experts`` of each layer, those with the highest
        ids (FedPer, Arivazhagan et al. 2019, arXiv:1912.00818, with experts for layers).
    capacities: experts per layer that simulated nodes can hold, in turn; a real node declares its own.
    aggregation: how the deltas of a tensor's holders become one.
    step_scale: ``contributions`` shortens the step of an expert that fewer nodes returned than could be expected.
    min_replies: a round with fewer acceptable replies changes nothing.
    average: of the models of several rounds, which is evaluated and published in place of the last one.
    """

    younger: ClassVar[frozenset[str]] = frozenset(
        {
            "aggregation",
            "average",
            "capacities",
            "expert_scope",
            "local_experts",
            "min_replies",
            "noise_test",
            "step_scale",
        }
    )

    rounds: int = Field(ge=1, le=1_000_000)
    experts_per_node: int = Field(ge=1)
    assignment: Literal["all", "random", "balanced", "sticky", "affinity"] = "balanced"
    min_holders: int = Field(default=1, ge=0)
    weights: Literal["declared", "uniform"] = "declared"
    cohort: CohortConfig = AllNodes()
    optimizer: ServerOptimizerConfig = ServerSgd()
    expert_scope: Literal["federated", "local", "mixed"] = "federated"
    local_experts: int = Field(default=0, ge=0)
    reply_timeout_s: float = Field(default=3600.0, gt=0.0)
    capacities: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field(default=(), strict=False, max_length=4096)

    aggregation: AggregationConfig = Mean()
    noise_test: NoiseTestConfig | None = None
    step_scale: Literal["none", "contributions"] = "none"
    min_replies: int = Field(default=1, ge=1)
    average: AverageConfig = NoAverage()

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


class EvaluationConfig(EvaluationSchedule):
    """Nodes measure the model on units that never train, and release the result noised, against a budget of its own.

    held_out: the share of each node's units that is kept out of training. In a deployment each owner decided it.
    epsilon: of all evaluations together, for a unit that is held out; if not given, that of training. A unit is
        on one side only, so its whole ε is the larger of the two, not their sum.
    """

    held_out: float = Field(default=0.2, ge=0.01, le=0.9)
    epsilon: float | None = Field(default=None, gt=0.0, le=1e6)
