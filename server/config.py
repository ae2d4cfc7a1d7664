"""Configuration of the federation: rounds, cohorts, assignment of experts, aggregation."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from model.config import Frozen
from server.aggregation_config import AggregationConfig, Mean
from server.averaging_config import AverageConfig, NoAverage
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


class NoiseTestConfig(Frozen):
    """Drop a reply that does not look like its noise, see :mod:`server.noise_likeness`.

    signal: what is assumed of honest nodes: that the sum of a batch's clipped gradients is at most so long, as a share
        of its units × the clip bound. 1 assumes nothing. Less finds smaller lies, and may drop who is over it.
    across_rounds: compare replies with what their node sent in earlier rounds. The server then keeps, and checkpoints,
        one float32 copy for each node of what it held so far. Without it, the same noise passes in every round.
    """

    signal: float = Field(default=1.0, gt=0.0, le=1.0)
    across_rounds: bool = True


class FederationConfig(Frozen):
    """How rounds run.

    experts_per_node: routed experts per layer that travel to a node (capped by what the node declares).
    assignment: ``all``, ``random``, ``balanced`` (holders as even as capacities allow, new ones every round) or
        ``sticky`` (a node keeps its experts while every expert has ``min_holders``), see :mod:`server.assignment`;
        ``affinity`` follows what nodes chose by ``[affinity]``, and is balanced before they did.
    min_holders: an expert that fewer nodes returned keeps its value. A federation that has not the places for so many
        holders of every expert in a round is refused; 0 lets a round pass experts by.
    weights: average deltas uniformly or by declared size.
    expert_scope: ``federated`` averages experts over their holders; ``local`` leaves each node its own, for ever: only
        router and shared weights travel; ``mixed`` does so with ``local_experts`` of each layer, those with the highest
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


class AffinityConfig(Frozen):
    """Nodes choose their experts every ``every`` rounds, each choice at ``epsilon``, by the exponential mechanism."""

    epsilon: float = Field(gt=0.0, le=10.0)
    every: int = Field(ge=1, le=1_000_000)


class NodePrivacyConfig(Frozen):
    """The node as the unit, protected by a trusted server beside what every node does for its records.

    (epsilon, delta) holds for the model after every round, under add or remove of one node with all that it ever sends.
    clip: bound of a node's joint delta of one round, L2; longer ones are scaled down.
    nodes: the public number of nodes that divisors are made of; how many there are is protected.
    """

    epsilon: float = Field(gt=0.0, le=1e6)
    delta: float = Field(gt=0.0, lt=1.0)
    clip: float = Field(gt=0.0, le=1e6)
    nodes: int = Field(ge=1, le=10_000_000)
