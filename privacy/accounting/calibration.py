"""σ of every release of a plan, calibrated with the very filter that will enforce the budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from conclave.base.errors import BadInputError
from conclave.privacy.accounting.filter import budget_units, epsilon_of, fixed_order
from conclave.privacy.accounting.mechanisms import ExponentialChoice, SampledGaussian, joint_noise, split_noise
from conclave.privacy.accounting.prices import charge_units

_LARGEST_NOISE = 1e6
_PRECISION = 1e-6  # of σ
_SUM_TOLERANCE = Fraction(1, 10**9)


@dataclass(frozen=True, kw_only=True)
class PlannedRelease:
    """``charges`` charges of ``steps`` Poisson-sampled steps each; several things may be released from each sample.

    sampling_rate: q in (0, 1]; 1 means no sampling.
    share: what it may spend of the RDP that the plan's choices leave, in (0, 1].
    parts: name → share of the joint precision σ⁻² of what is released from one sample together; the shares sum to 1.

    Raises:
        BadInputError: a value outside its range.
    """

    sampling_rate: float
    steps: int
    charges: int
    share: float = 1.0
    parts: tuple[tuple[str, float], ...] = (("gradients", 1.0),)

    def __post_init__(self) -> None:
        SampledGaussian(sampling_rate=self.sampling_rate, noise_multiplier=1.0, steps=self.steps)
        if self.charges < 1:
            raise BadInputError(f"charges is {self.charges}, must be at least 1")
        if not 0.0 < self.share <= 1.0:
            raise BadInputError(f"share is {self.share}, must be above 0 and at most 1")
        if len({name for name, _ in self.parts}) != len(self.parts):
            raise BadInputError("two parts have one name, must have names of their own")
        for name, precision in self.parts:
            if not 0.0 < precision <= 1.0:
                raise BadInputError(f"the precision of part {name} is {precision}, must be above 0 and at most 1")
        if abs(_exact_sum(precision for _, precision in self.parts) - 1) > _SUM_TOLERANCE:
            total = math.fsum(precision for _, precision in self.parts)
            raise BadInputError(f"the precisions of the parts sum to {total}, must sum to 1")


@dataclass(frozen=True, kw_only=True)
class PlannedChoices:
    """``charges`` charges of a mechanism whose cost is fixed, such as choices by the exponential mechanism."""

    mechanism: ExponentialChoice
    charges: int

    def __post_init__(self) -> None:
        if self.charges < 1:
            raise BadInputError(f"charges is {self.charges}, must be at least 1")


@dataclass(frozen=True, kw_only=True)
class CalibratedRelease:
    """σ of one planned release.

    noise_multiplier: what is charged: :func:`~conclave.privacy.accounting.mechanisms.joint_noise` of the parts.
    parts: name → σ of that part, relative to its own sensitivity.
    """

    noise_multiplier: float
    parts: tuple[tuple[str, float], ...]


def calibrate_plan(
    *,
    epsilon: float,
    delta: float,
    releases: Sequence[PlannedRelease],
    choices: Sequence[PlannedChoices] = (),
) -> tuple[CalibratedRelease, ...]:
    """Return the smallest σ (to 1e-6) for which all charges of a plan together pass the filter of (ε, δ).

    Choices have their price and are paid first; the releases divide the rest by their shares. What the rounding of σ
    leaves of a share goes to the release with the next smaller one.

    Guarantee: the charges, made as planned and priced by :func:`~conclave.privacy.accounting.prices.charge_units` at
    the fixed order of (ε, δ), sum to at most :func:`~conclave.privacy.accounting.filter.budget_units`.

    Raises:
        BadInputError: the shares exceed 1, the choices alone exceed the budget, or even σ = 1e6 is not enough.
    """
    order = fixed_order(epsilon, delta)
    budget = budget_units(epsilon, delta, order)
    if _exact_sum(release.share for release in releases) > 1 + _SUM_TOLERANCE:
        total = math.fsum(release.share for release in releases)
        raise BadInputError(f"the shares of the releases sum to {total}, must sum to at most 1")
    price = sum(charge_units(planned.mechanism, order) * planned.charges for planned in choices)
    if price > budget or (releases and price == budget):
        raise BadInputError(
            f"the planned choices alone cost epsilon {epsilon_of(price, order, delta):.4g}, "
            f"must leave room in a budget of epsilon {epsilon} at delta {delta}"
        )
    left, carried = budget - price, 0
    calibrated: dict[int, CalibratedRelease] = {}
    for number in sorted(range(len(releases)), key=lambda n: -releases[n].share):
        release = releases[number]
        available = min(math.floor(Fraction(release.share) * (budget - price)) + carried, left)
        sigma = _smallest_noise(release, order, available, epsilon, delta)
        parts = split_noise(sigma, release.parts)
        joint = joint_noise(noise for _, noise in parts)
        calibrated[number] = CalibratedRelease(noise_multiplier=joint, parts=parts)
        spent = _price(release, joint, order)
        left, carried = left - spent, available - spent
    return tuple(calibrated[number] for number in range(len(releases)))


@lru_cache(maxsize=256)
def calibrate_noise(
    *,
    epsilon: float,
    delta: float,
    sampling_rate: float,
    steps_per_charge: int,
    charges: int,
    choices: tuple[PlannedChoices, ...] = (),
) -> float:
    """Return the smallest σ (to 1e-6) for which all charges of a plan of one release pass the filter of (ε, δ).

    Args:
        choices: what the same plan pays for first.

    Raises:
        BadInputError: the choices alone exceed the budget, or even σ = 1e6 is not enough.
    """
    release = PlannedRelease(sampling_rate=sampling_rate, steps=steps_per_charge, charges=charges)
    return calibrate_plan(epsilon=epsilon, delta=delta, releases=[release], choices=choices)[0].noise_multiplier


def _price(release: PlannedRelease, noise: float, order: float) -> int:
    charge = SampledGaussian(sampling_rate=release.sampling_rate, noise_multiplier=noise, steps=release.steps)
    return charge_units(charge, order) * release.charges


def _smallest_noise(release: PlannedRelease, order: float, available: int, epsilon: float, delta: float) -> float:
    def fits(noise: float) -> bool:
        try:
            return _price(release, noise, order) <= available
        except BadInputError:
            return False

    high = 1.0
    while not fits(high):
        high *= 2.0
        if high > _LARGEST_NOISE:
            raise BadInputError(
                f"no noise multiplier up to {_LARGEST_NOISE:g} brings {release.charges} charges within "
                f"{_share_of(release)}epsilon {epsilon} at delta {delta}; "
                "ask for fewer rounds or a larger epsilon"
            )
    low = 0.0
    while high - low > _PRECISION:
        middle = (low + high) / 2.0
        low, high = (low, middle) if fits(middle) else (middle, high)
    return math.ceil(high * 1e6) / 1e6


def _share_of(release: PlannedRelease) -> str:
    return "" if release.share == 1.0 else f"a share of {release.share:g} of "


def _exact_sum(values: Iterable[float]) -> Fraction:
    return sum((Fraction(value) for value in values), Fraction(0))
