"""Configuration of private evaluation: what is held out, how often it is measured, and what a plan says of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from conclave.base.frozen import Frozen
from conclave.privacy.accounting.mechanisms import LARGEST_NOISE, SampledGaussian


class _Schedule(Frozen):
    """When nodes evaluate, and with which experts.

    every: rounds from one evaluation to the next; the last round always ends with one.
    experts: those that a node is ``assigned`` in that round, or ``all`` where the node can hold them.
    """

    every: int = Field(default=10, ge=1, le=1_000_000)
    experts: Literal["assigned", "all"] = "assigned"

    def due(self, round_number: int, rounds: int) -> bool:
        """Whether nodes evaluate after this round of a run."""
        return round_number % self.every == 0 or round_number == rounds

    def count(self, rounds: int) -> int:
        """Return how often nodes evaluate in a run."""
        return -(-rounds // self.every)


class EvaluationConfig(_Schedule):
    """Nodes measure the model on units that never train, and release the result noised, against a budget of its own.

    held_out: the share of each node's units that is kept out of training. In a deployment each owner decided it.
    epsilon: of all evaluations together, for a unit that is held out; the training's where it is not given. A unit is
        on one side only, so its whole ε is the larger of the two, not their sum.
    """

    held_out: float = Field(default=0.2, ge=0.01, le=0.9)
    epsilon: float | None = Field(default=None, gt=0.0, le=1e6)


class EvaluationPlan(_Schedule):
    """What a plan says of evaluation. noise_multiplier: σ of each; None only without privacy."""

    noise_multiplier: float | None = Field(gt=0.0, le=LARGEST_NOISE)

    @property
    def mechanism(self) -> SampledGaussian | None:
        """What one evaluation is charged as: every held-out unit takes part; None without privacy."""
        if self.noise_multiplier is None:
            return None
        return SampledGaussian(sampling_rate=1.0, noise_multiplier=self.noise_multiplier, steps=1)
