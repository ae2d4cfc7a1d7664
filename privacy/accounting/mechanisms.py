"""What a charge can be: Poisson-sampled Gaussian steps, or choices by the exponential mechanism."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from conclave.base.errors import BadInputError

SMALLEST_NOISE = 1e-2  # below it the RDP overflows, and no real budget could pay
SMALLEST_RATE, LARGEST_NOISE, MOST_STEPS = 1e-9, 1e9, 10**9
"""Beyond them accountants lose their footing; no ledger takes such a charge, and no audit accepts one."""


@dataclass(frozen=True, kw_only=True)
class SampledGaussian:
    """The cost-relevant parameters of one charge: ``steps`` Poisson-subsampled Gaussian releases.

    sampling_rate: q in (0, 1]; 1 means no sampling.
    noise_multiplier: σ relative to the sensitivity of everything released from one sample together, finite and > 0.
    steps: at least 1.

    Raises:
        BadInputError: a value outside its range.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        if not 0.0 < self.sampling_rate <= 1.0:
            raise BadInputError(f"sampling_rate is {self.sampling_rate}, must be above 0 and at most 1")
        if not 0.0 < self.noise_multiplier < math.inf:
            raise BadInputError(f"noise_multiplier is {self.noise_multiplier}, must be finite and above 0")
        _at_least_one("steps", self.steps)


@dataclass(frozen=True, kw_only=True)
class ExponentialChoice:
    """``choices`` choices by the exponential mechanism, each with weights ``exp(ε·u / (2Δ))``.

    epsilon: ε of one choice, finite and > 0.
    choices: at least 1.

    Guarantee: one choice is ε-bounded-range (Dong, Durfee & Rogers 2020, arXiv:1909.13830), which is stronger than
    ε-DP and implies ε²/8-zCDP (Cesar & Rogers 2021, arXiv:2004.07223).

    Raises:
        BadInputError: a value outside its range.
    """

    epsilon: float
    choices: int

    def __post_init__(self) -> None:
        if not 0.0 < self.epsilon < math.inf:
            raise BadInputError(f"epsilon is {self.epsilon}, must be finite and above 0")
        _at_least_one("choices", self.choices)

    def rdp(self, order: float) -> float:
        """Return the RDP of all choices at ``order`` > 1, in nats: min(ε, order·ε²/8) each."""
        return self.choices * min(self.epsilon, order * self.epsilon**2 / 8.0)


Mechanism = SampledGaussian | ExponentialChoice


def joint_noise(noise_multipliers: Iterable[float]) -> float:
    """Return σ of everything released from one Poisson sample together: ``(Σ σᵢ⁻²)^−½``, rounded down.

    Several releases of one sample are one event; charged separately, each with its own sampling, ε is understated.
    The result is the largest float not above the exact value, so one release keeps its σ.

    Raises:
        BadInputError: no noise multiplier, or one that is not finite and above 0.
    """
    values = tuple(noise_multipliers)
    if not values:
        raise BadInputError("there is no noise multiplier, must be at least one")
    for value in values:
        if not 0.0 < value < math.inf:
            raise BadInputError(f"noise_multiplier is {value}, must be finite and above 0")
    precision = sum((1 / Fraction(value) ** 2 for value in values), Fraction(0))
    smallest = min(values)
    joint = smallest / math.sqrt(precision * Fraction(smallest) ** 2)  # no overflow: the root is between 1 and √n
    while Fraction(joint) ** 2 * precision > 1:
        joint = math.nextafter(joint, 0.0)
    while Fraction(above := math.nextafter(joint, math.inf)) ** 2 * precision <= 1:
        joint = above
    return joint


def split_noise(noise_multiplier: float, shares: Iterable[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    """Return σ of each part of what is released from one sample, ``σᵢ = σ/√shareᵢ``: inverse to :func:`joint_noise`.

    Each is the smallest float not below the exact value, so together they have at least ``noise_multiplier``; a single
    part has exactly that.

    Args:
        noise_multiplier: σ of all parts together.
        shares: name → share of the joint precision σ⁻², in (0, 1]; what they sum to counts as the whole.
    """
    shares = tuple(shares)
    total = sum((Fraction(share) for _, share in shares), Fraction(0))
    parts = []
    for name, share in shares:
        exact = Fraction(noise_multiplier) ** 2 * total / Fraction(share)  # σᵢ²
        noise = math.sqrt(exact)
        while Fraction(noise) ** 2 < exact:
            noise = math.nextafter(noise, math.inf)
        while Fraction(below := math.nextafter(noise, 0.0)) ** 2 >= exact:
            noise = below
        parts.append((name, noise))
    return tuple(parts)


def accountable(mechanism: Mechanism) -> bool:
    """Whether accountants can be trusted with a mechanism."""
    if isinstance(mechanism, ExponentialChoice):
        return mechanism.choices <= MOST_STEPS
    return (
        mechanism.sampling_rate >= SMALLEST_RATE
        and mechanism.noise_multiplier <= LARGEST_NOISE
        and mechanism.steps <= MOST_STEPS
    )


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise BadInputError(f"{name} is {value}, must be at least 1")
