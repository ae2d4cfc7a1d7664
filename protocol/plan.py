"""What a run asks of every node, all of it: the document that is hashed, admitted and charged."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Size

from conclave.base.canonical import sha256
from conclave.base.frozen import Frozen
from conclave.model.config import ModelConfig
from conclave.model.experts.config import HeldExperts
from conclave.model.parameters import owner, shapes
from conclave.privacy.accounting.filter import charge_units
from conclave.privacy.accounting.mechanisms import LARGEST_NOISE, SampledGaussian
from conclave.privacy.releases.choice_config import ChoicePlan
from conclave.privacy.releases.evaluation_config import EvaluationPlan
from conclave.privacy.releases.load_histogram import load_shapes, noise_parts, release_shares
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


class Plan(Frozen):
    """What a run will ask of every node, fixed before the first round and independent of private data.

    noise_multiplier: σ of everything that is released from one sample, calibrated for all ``rounds``; None only where
        ``privacy.mechanism`` is ``none``.
    load_share: share of σ⁻² that a histogram of expert loads gets, see :mod:`conclave.privacy.releases.load_histogram`;
        0 for none.
    affinity: choices of experts that nodes make; None where the server alone assigns them.
    local_experts: so many of each layer's routed experts, those with the highest ids, never travel: every node trains
        its own.
    evaluation: measuring on held-out units; a budget of its own pays for it. None where there is none.
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

    def releases(self, order: float) -> dict[str, float]:
        """Return what leaves a node under this plan, and each one's share of what the plan costs at an RDP order.

        Args:
            order: of the ledger that pays. The plan's own (ε, δ) say nothing: at another order, choices look cheaper.
        """
        choice = {} if self.affinity is None else {"choice": self.choice_share(order)}
        return release_shares(self.load_share) | choice

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

    def choice_share(self, order: float) -> float:
        """Return what share of the plan's RDP at ``order`` its choices of experts take; 0 with none."""
        if self.affinity is None or self.noise_multiplier is None:
            return 0.0
        choices = self.affinity.count(self.rounds) * charge_units(self.affinity.mechanism(self.model.layers), order)
        step = SampledGaussian(
            sampling_rate=self.privacy.sampling_rate,
            noise_multiplier=self.noise_multiplier,
            steps=self.training.steps,
        )
        return choices / (choices + self.rounds * charge_units(step, order))

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
