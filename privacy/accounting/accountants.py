"""ε of a fixed sequence of charges by three accountants, for reading and comparing.

Valid only for a sequence fixed in advance: the enforced value is :func:`conclave.privacy.accounting.filter.epsilon_of`
the ledger's total, which needs none of this.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from conclave.base.errors import BadInputError
from conclave.privacy.accounting.mechanisms import SMALLEST_NOISE, ExponentialChoice, Mechanism
from conclave.privacy.accounting.rdp_curves import ORDERS, Pair, epsilon_from_curve, rdp_curves
from conclave.privacy.accounting.rounded_pairs import round_pairs

MOST_PAIRS = 256  # distinct (q, σ) that PLD and PRV compose as they are
_ROUNDED_DOWN = 1.0 - 1e-12  # covers floating point

Charges = Mapping[Mechanism, int] | Iterable[Mechanism]


@dataclass(frozen=True)
class AccountantReport:
    """ε by accountant, and how the charges were rounded for PLD and PRV; None if they were not.

    Every value is an upper bound, rounded or not.
    """

    epsilon: dict[str, float]
    grid: str | None


def accountant_report(charges: Charges, delta: float) -> AccountantReport:
    """Return ε by ``rdp`` (dp-accounting's default orders, exact), ``pld`` (dp-accounting) and ``prv`` (Opacus).

    Beyond :data:`MOST_PAIRS` distinct (q, σ), PLD and PRV see groups of them as one, σ rounded down and q up; the
    report then states how far, and what RDP would make of it. Nothing is rounded for RDP.

    ``pld`` and ``prv`` are left out with choices by the exponential mechanism, for which neither has an event, and
    where the losses are beyond what they can hold (about 700 nats for PRV). PRV adds its numerical error: 0.01,
    more for very long or very mixed sequences (:func:`~conclave.privacy.accounting.prv_epsilon.prv_epsilon`).

    Args:
        charges: mechanisms, or mechanism → how often it is charged.

    Raises:
        BadInputError: a noise multiplier below 0.01, a count below 0, or a δ outside (0, 1).
    """
    if not 0.0 < delta < 1.0:
        raise BadInputError(f"delta is {delta}, must be above 0 and below 1")
    steps, choices = _tally(charges)
    epsilon, grid = _report(tuple(sorted(steps.items())), tuple(sorted(choices.items())), delta)
    return AccountantReport(dict(epsilon), grid)


def epsilon_by_accountant(charges: Charges, delta: float) -> dict[str, float]:
    """Return only the values of :func:`accountant_report`; see there. No charges give 0 by all three."""
    return accountant_report(charges, delta).epsilon


def _tally(charges: Charges) -> tuple[dict[Pair, int], dict[float, int]]:
    """Sum steps by (q, σ), and choices by their ε."""
    counts = charges.items() if isinstance(charges, Mapping) else ((mechanism, 1) for mechanism in charges)
    steps: dict[Pair, int] = {}
    choices: dict[float, int] = {}
    for mechanism, count in counts:
        if count < 0:
            raise BadInputError(f"a mechanism is charged {count} times, must be at least 0")
        if count == 0:
            continue
        if isinstance(mechanism, ExponentialChoice):
            choices[mechanism.epsilon] = choices.get(mechanism.epsilon, 0) + count * mechanism.choices
            continue
        if mechanism.noise_multiplier < SMALLEST_NOISE:
            raise BadInputError(f"a noise multiplier of {mechanism.noise_multiplier} costs more than any budget")
        pair = (mechanism.sampling_rate, mechanism.noise_multiplier)
        steps[pair] = steps.get(pair, 0) + count * mechanism.steps
    return steps, choices


@lru_cache(maxsize=16)
def _report(
    steps: tuple[tuple[Pair, int], ...], choices: tuple[tuple[float, int], ...], delta: float
) -> tuple[tuple[tuple[str, float], ...], str | None]:
    if not steps and not choices:
        return (("rdp", 0.0), ("pld", 0.0), ("prv", 0.0)), None
    curve = np.zeros(len(ORDERS))
    for epsilon, count in choices:
        choice = ExponentialChoice(epsilon=epsilon, choices=count)
        curve += [choice.rdp(order) for order in ORDERS]
    by_rdp = _rdp_epsilon(dict(steps), curve, delta)
    if choices:
        return (("rdp", by_rdp),), None
    # Opacus, which comes with PRV, takes longer to load than any command that reports nothing may take.
    from conclave.privacy.accounting.pld_epsilon import pld_epsilon
    from conclave.privacy.accounting.prv_epsilon import prv_epsilon

    merged, rounding = round_pairs(_unsampled_as_one(dict(steps)), MOST_PAIRS)
    values = {"rdp": by_rdp, "pld": pld_epsilon(merged, delta), "prv": prv_epsilon(merged, delta)}
    grid = None
    if rounding is not None:
        grid = f"{rounding}; RDP rises from {by_rdp:.4f} to {_rdp_epsilon(merged, curve, delta):.4f} with it"
    return tuple((name, value) for name, value in values.items() if value is not None), grid


def _rdp_epsilon(steps: dict[Pair, int], other: NDArray[np.float64], delta: float) -> float:
    counts = np.array(list(steps.values()), dtype=np.float64)
    return epsilon_from_curve(other + counts @ rdp_curves(list(steps)), delta)


def _unsampled_as_one(steps: dict[Pair, int]) -> dict[Pair, int]:
    """Gaussians without sampling compose to one Gaussian, exactly."""
    precision = math.fsum(count / sigma**2 for (q, sigma), count in steps.items() if q == 1.0)
    if not precision:
        return steps
    sampled = {pair: count for pair, count in steps.items() if pair[0] < 1.0}
    return sampled | {(1.0, precision**-0.5 * _ROUNDED_DOWN): 1}
