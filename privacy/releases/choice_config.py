"""What a plan says about experts that nodes choose themselves."""

from __future__ import annotations

from pydantic import Field

from conclave.base.frozen import Frozen
from conclave.privacy.accounting.calibration import PlannedChoices
from conclave.privacy.accounting.mechanisms import ExponentialChoice


class ChoicePlan(Frozen):
    """Every ``every`` rounds, a node chooses ``experts`` of each layer by what they are worth to its records.

    epsilon: of one choice by the exponential mechanism; ``experts`` choices a layer are as many charges.
    """

    epsilon: float = Field(gt=0.0, le=10.0)
    every: int = Field(ge=1, le=1_000_000)
    experts: int = Field(ge=1, le=4096)

    def due(self, round_number: int) -> bool:
        """Whether nodes choose before this round; never before the first, when no router has learned anything."""
        return round_number > 1 and (round_number - 1) % self.every == 0

    def count(self, rounds: int) -> int:
        """Return how often nodes choose in a run."""
        return (rounds - 1) // self.every

    def mechanism(self, layers: int) -> ExponentialChoice:
        """Return what one round's choosing is charged as."""
        return ExponentialChoice(epsilon=self.epsilon, choices=self.experts * layers)

    def planned(self, rounds: int, layers: int) -> tuple[PlannedChoices, ...]:
        """Return what all choosing of a run is charged as; nothing in a run too short for it."""
        count = self.count(rounds)
        return (PlannedChoices(mechanism=self.mechanism(layers), charges=count),) if count else ()
