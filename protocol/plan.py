"""What a run asks of every node, all of it: the document that is hashed, admitted and charged.

What it costs: :mod:`conclave.protocol.charges`.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Size

from conclave.base.canonical import sha256
from conclave.base.frozen import Frozen
from conclave.model.config import ModelConfig
from conclave.model.experts.config import HeldExperts
from conclave.model.parameters import owner, shapes
from conclave.privacy.accounting.mechanisms import LARGEST_NOISE
from conclave.privacy.releases.load_histogram import load_shapes, noise_parts
from conclave.privacy.training.config import PrivacyConfig
from conclave.privacy.training.local_optimizers import OptimizerConfig, SgdConfig
from conclave.protocol.encodings import TrafficConfig


class TrainingConfig(Frozen):
    """Local training of one round: ``steps`` of ``optimizer`` at ``learning_rate``.

    ``expert_learning_rate = "held"`` multiplies the experts' rate by k/E on a node that holds k of E: with fewer
    experts to choose from, each sees E/k times the tokens, and its gradient grows with them.
    """

    steps: int = Field(default=1, ge=1, le=100_000)
    learning_rate: float = Field(gt=0.0, le=1e4)
    optimizer: OptimizerConfig = SgdConfig()
    expert_learning_rate: Literal["same", "held"] = "same"


class ChoicePlan(Frozen):
    """Every ``every`` rounds, a node chooses ``experts`` of each layer by what they are worth to its records.

    epsilon: of one choice by the exponential mechanism; ``experts`` choices a layer are as many charges.
    """

    epsilon: float = Field(gt=0.0, le=10.0)
    every: int = Field(ge=1, le=1_000_000)
    experts: int = Field(ge=1, le=4096)

    def due(self, round_number: int) -> bool:
        """Whether nodes choose before this round; never before the first: no router has learned anything yet."""
        return round_number > 1 and (round_number - 1) % self.every == 0

    def count(self, rounds: int) -> int:
        """Return how often nodes choose in a run."""
        return (rounds - 1) // self.every


class EvaluationSchedule(Frozen):
    """When nodes evaluate, and with which experts.

    every: rounds from one evaluation to the next; the last round always ends with one.
    experts: those that a node is ``assigned`` in that round, or ``all`` if the node can hold them.
    """

    every: int = Field(default=10, ge=1, le=1_000_000)
    experts: Literal["assigned", "all"] = "assigned"

    def due(self, round_number: int, rounds: int) -> bool:
        """Whether nodes evaluate after this round of a run."""
        return round_number % self.every == 0 or round_number == rounds

    def count(self, rounds: int) -> int:
        """Return how often nodes evaluate in a run."""
        return -(-rounds // self.every)


class EvaluationPlan(EvaluationSchedule):
    """What a plan says of evaluation. noise_multiplier: σ of each; None only without privacy."""

    noise_multiplier: float | None = Field(gt=0.0, le=LARGEST_NOISE)


class Plan(Frozen):
    """What a run will ask of every node, fixed before the first round and independent of private data.

    noise_multiplier: σ of everything that is released from one sample, calibrated for all ``rounds``; None only if
        ``privacy.mechanism`` is ``none``.
    load_share: share of σ⁻² that a histogram of expert loads gets, see :mod:`conclave.privacy.releases.load_histogram`;
        0 for none.
    affinity: choices of experts that nodes make; None if the server alone assigns them.
    local_experts: this many of each layer's routed experts, those with the highest ids, never travel: every node trains
        its own.
    evaluation: measuring on held-out units, which a separate budget pays for; None if there is none.
    """

    younger: ClassVar[frozenset[str]] = frozenset({"affinity", "evaluation", "load_share", "local_experts", "traffic"})
    model: ModelConfig
    privacy: PrivacyConfig
    training: TrainingConfig
    rounds: int = Field(ge=1, le=1_000_000)
    noise_multiplier: float | None = Field(gt=0.0, le=LARGEST_NOISE)
    load_share: float = Field(default=0.0, ge=0.0, le=0.5)
    local_experts: int = Field(default=0, ge=0)
    affinity: ChoicePlan | None = None
    traffic: TrafficConfig = TrafficConfig()
    evaluation: EvaluationPlan | None = None

    def stays(self, wire_name: str) -> bool:
        """Whether a tensor is of an expert that never travels. Its router's row does travel."""
        group, _, expert = owner(wire_name)
        return group == "expert" and expert is not None and expert >= self.model.experts.routed - self.local_experts

    def travelling(self, held: HeldExperts) -> dict[str, Size]:
        """Wire name → shape of every tensor that goes to a holder of ``held``, and comes back."""
        every = shapes(self.model, held)
        return {name: shape for name, shape in every.items() if not self.stays(name)} if self.local_experts else every

    @model_validator(mode="after")
    def _can_choose(self) -> Self:
        if self.affinity is None:
            return self
        if self.noise_multiplier is None:
            raise ValueError("affinity is set, must be left out without privacy")
        if self.model.source is not None:
            raise ValueError("affinity is set, must be left out for a model of the user's own")
        if not self.model.experts.top_k <= self.affinity.experts <= self.model.experts.routed:
            raise ValueError(
                f"affinity.experts is {self.affinity.experts}, must be from top_k {self.model.experts.top_k} "
                f"to {self.model.experts.routed}"
            )
        return self

    @model_validator(mode="after")
    def _measures_what_exists(self) -> Self:
        if self.evaluation is None:
            return self
        if (self.evaluation.noise_multiplier is None) != (self.noise_multiplier is None):
            raise ValueError("evaluation.noise_multiplier must be set with privacy, and only then")
        if self.evaluation.experts == "all" and self.local_experts:
            raise ValueError("evaluation.experts is all, must be assigned where experts stay on nodes")
        return self

    @model_validator(mode="after")
    def _experts_exist(self) -> Self:
        if self.local_experts > self.model.experts.routed:
            raise ValueError(f"local_experts is {self.local_experts}, must be at most {self.model.experts.routed}")
        return self

    @model_validator(mode="after")
    def _loads_can_be_told(self) -> Self:
        if not self.load_share:
            return self
        if self.load_share < 1e-4:
            raise ValueError(f"load_share is {self.load_share}, must be 0 or at least 0.0001")
        if self.noise_multiplier is None:
            raise ValueError(f"load_share is {self.load_share}, must be 0 without privacy")
        if self.model.source is not None:
            raise ValueError(f"load_share is {self.load_share}, must be 0 for a model of the user's own")
        return self

    @property
    def hash(self) -> str:
        """SHA-256 of the plan's JSON, which names every field in a fixed order."""
        return sha256(self.json_for_hash().encode())

    @property
    def noise_parts(self) -> dict[str, float]:
        """σ of each release, relative to its own sensitivity.

        See :func:`conclave.privacy.releases.load_histogram.noise_parts`.

        Raises:
            ValueError: the plan is without privacy.
        """
        if self.noise_multiplier is None:
            raise ValueError("there is no noise without privacy")
        return noise_parts(self.noise_multiplier, self.load_share)

    @property
    def choosing_shapes(self) -> dict[str, Size]:
        """Name → shape of what a node needs to choose: the shared weights and every expert's router row."""
        every = shapes(self.model, self.model.all_experts)
        return {name: shape for name, shape in every.items() if owner(name).group != "expert"}

    @property
    def metric(self) -> tuple[str, float]:
        """What is measured on held-out units, and what a unit's value of 1 stands for.

        ``accuracy``; or ``bits_per_byte``, of which more than 8, a uniform guess, count as 8.
        """
        return ("accuracy", 1.0) if self.model.head.kind == "classification" else ("bits_per_byte", 8.0)

    @property
    def metric_shapes(self) -> dict[str, Size]:
        """Name → shape of what an evaluation releases; see :mod:`conclave.privacy.releases.private_metrics`."""
        return {f"metric/{self.metric[0]}": Size([2])}

    def reply_shapes(self, held: HeldExperts) -> dict[str, Size]:
        """Return name → shape of every tensor of a reply to a request for ``held``: the delta's, and the loads'."""
        delta = self.travelling(held)
        return delta | load_shapes(held) if self.load_share else delta
