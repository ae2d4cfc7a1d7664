"""What releases cost: charges, the filter that enforces a budget, σ from a plan, ε by several accountants.

The canonical form of a mechanism is a ``dp_accounting.DpEvent``. A budget (ε, δ) is enforced with Rényi
differential privacy at ONE order α, fixed when the ledger is created: the sum of the charges' RDP at α may
not exceed ``ε − conversion(α, δ)``. That sum is valid for adaptively chosen charges (Feldman & Zrnic 2021,
arXiv:2008.11193), where a PLD curve is not a stopping rule. RDP is counted in whole units of 1e-12; charges
round up and budgets round down.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import dp_accounting as dpa
from absl import logging as absl_logging
from dp_accounting import pld, rdp
from opacus.accountants import PRVAccountant

from model.errors import BadInputError

UNITS_PER_NAT = 10**12
_RELATIVE_SLACK = 1e-9  # covers the floating-point error of one RDP evaluation, on the private side
_LARGEST_NOISE = 1e6
_SMALLEST_NOISE = 1e-2  # below it the RDP overflows, and no real budget could pay

NEIGHBORS = dpa.NeighboringRelation.ADD_OR_REMOVE_ONE


@dataclass(frozen=True, kw_only=True)
class SampledGaussian:
    """The cost-relevant parameters of one charge: ``steps`` Poisson-subsampled Gaussian releases.

    noise_multiplier: σ relative to the sensitivity of everything released from one sample together.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int

    @property
    def event(self) -> dpa.DpEvent:
        """The mechanism as a dp-accounting event."""
        gaussian = dpa.GaussianDpEvent(self.noise_multiplier)
        sampled = dpa.PoissonSampledDpEvent(self.sampling_rate, gaussian)
        return dpa.SelfComposedDpEvent(sampled if self.sampling_rate < 1.0 else gaussian, self.steps)


def conversion(order: float, delta: float) -> float:
    """Return what turning RDP at ``order`` into (ε, δ) adds to ε (Canonne et al. 2020, arXiv:2004.00010)."""
    return math.log1p(-1.0 / order) - (math.log(delta) + math.log(order)) / (order - 1.0)


@lru_cache(maxsize=256)
def fixed_order(epsilon: float, delta: float) -> float:
    """Choose the RDP order for a budget, to one decimal; independent of any data or plan.

    Any order is valid; it only decides how much of the budget a plan can use. For an unsampled Gaussian the
    best one maximises ``(ε − conversion)/α``. Subsampling makes high orders dearer: over q from 0.01 to 0.5
    the best orders lie near 85 % of the way from 1 to that maximiser (ε = 8: 2.9–3.6, ε = 3: 5.7–7.2).

    Raises:
        BadInputError: no order up to 1024 leaves room for a charge.
    """
    grid = [1.0 + 1.01**i / 20.0 for i in range(1000)]
    usable = [a for a in grid if conversion(a, delta) < epsilon]
    if not usable:
        raise BadInputError(f"epsilon is {epsilon} at delta {delta}, must be larger to allow any release")
    best = max(usable, key=lambda a: (epsilon - conversion(a, delta)) / a)
    shrunk = round(1.0 + 0.85 * (best - 1.0), 1)
    return shrunk if shrunk > 1.0 and conversion(shrunk, delta) < epsilon else best


def budget_units(epsilon: float, delta: float, order: float) -> int:
    """Return the RDP budget at ``order`` that implies (ε, δ), rounded down."""
    return max(0, math.floor((epsilon - conversion(order, delta)) * UNITS_PER_NAT))


def epsilon_of(units: int, order: float, delta: float) -> float:
    """Return the ε that RDP of ``units`` at ``order`` implies: the enforced, reported value. 0 for 0 units."""
    if units == 0:
        return 0.0
    return max(0.0, units / UNITS_PER_NAT + conversion(order, delta))


def charge_units(mechanism: SampledGaussian, order: float) -> int:
    """Return what a charge costs at ``order``: its RDP plus a margin for rounding, rounded up.

    Raises:
        BadInputError: the RDP is not finite (σ so small that no budget could pay for it).
    """
    return math.ceil(rdp_at(mechanism, order) * (1.0 + _RELATIVE_SLACK) * UNITS_PER_NAT)


@lru_cache(maxsize=65_536)
def rdp_at(mechanism: SampledGaussian, order: float) -> float:
    """Return the RDP of a charge at ``order`` in nats, as dp-accounting computes it.

    Raises:
        BadInputError: see :func:`charge_units`.
    """
    value = _rdp(mechanism.event, order) if mechanism.noise_multiplier >= _SMALLEST_NOISE else math.inf
    if not math.isfinite(value) and mechanism.noise_multiplier >= _SMALLEST_NOISE:
        # The series for a fractional order did not converge. RDP grows with the order.
        value = _rdp(mechanism.event, math.ceil(order))
    if not math.isfinite(value):
        raise BadInputError(f"a noise multiplier of {mechanism.noise_multiplier} costs more than any budget")
    return value


def _rdp(event: dpa.DpEvent, order: float) -> float:
    with _quiet_absl():
        accountant = rdp.RdpAccountant(orders=[order], neighboring_relation=NEIGHBORS).compose(event)
    return float(accountant._rdp[0])


@contextlib.contextmanager
def _quiet_absl() -> Iterator[None]:
    """Silence dp-accounting's warning about non-convergence, which the caller handles."""
    before = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        yield
    finally:
        absl_logging.set_verbosity(before)


@lru_cache(maxsize=256)
def calibrate_noise(
    *, epsilon: float, delta: float, sampling_rate: float, steps_per_charge: int, charges: int
) -> float:
    """Return the smallest σ (to 1e-6) for which all charges of a plan pass the filter of (ε, δ).

    Raises:
        BadInputError: even σ = 1e6 is not enough.
    """
    order = fixed_order(epsilon, delta)
    budget = budget_units(epsilon, delta, order)

    def fits(noise: float) -> bool:
        mechanism = SampledGaussian(sampling_rate=sampling_rate, noise_multiplier=noise, steps=steps_per_charge)
        try:
            return charge_units(mechanism, order) * charges <= budget
        except BadInputError:
            return False

    high = 1.0
    while not fits(high):
        high *= 2.0
        if high > _LARGEST_NOISE:
            raise BadInputError(
                f"no noise multiplier up to {_LARGEST_NOISE:g} brings {charges} charges within "
                f"epsilon {epsilon} at delta {delta}; ask for fewer rounds or a larger epsilon"
            )
    low = 0.0
    while high - low > 1e-6:
        middle = (low + high) / 2.0
        low, high = (low, middle) if fits(middle) else (middle, high)
    return math.ceil(high * 1e6) / 1e6


def epsilon_by_accountant(charges: Iterable[SampledGaussian], delta: float) -> dict[str, float]:
    """Return ε of a fixed sequence of charges by three accountants: ``rdp``, ``pld`` (dp-accounting), ``prv`` (Opacus).

    For reading and comparing, and valid only for a sequence fixed in advance: the enforced value is
    :func:`epsilon_of` the ledger's total.
    """
    steps: dict[tuple[float, float], int] = {}
    for charge in charges:
        key = (charge.sampling_rate, charge.noise_multiplier)
        steps[key] = steps.get(key, 0) + charge.steps
    return dict(_epsilon_by_accountant(tuple(sorted(steps.items())), delta))


@lru_cache(maxsize=256)
def _epsilon_by_accountant(
    steps: tuple[tuple[tuple[float, float], int], ...], delta: float
) -> tuple[tuple[str, float], ...]:
    if not steps:
        return (("rdp", 0.0), ("pld", 0.0), ("prv", 0.0))
    event = dpa.ComposedDpEvent(
        [SampledGaussian(sampling_rate=q, noise_multiplier=s, steps=n).event for (q, s), n in steps]
    )
    with _quiet_absl():
        by_rdp = float(rdp.RdpAccountant(neighboring_relation=NEIGHBORS).compose(event).get_epsilon(delta))
        by_pld = float(pld.PLDAccountant(neighboring_relation=NEIGHBORS).compose(event).get_epsilon(delta))
    prv: Any = PRVAccountant()
    prv.history = [(s, q, n) for (q, s), n in steps]
    with warnings.catch_warnings():  # Opacus brackets ε with a coarse RDP grid and log(0) first, and says so
        warnings.simplefilter("ignore")
        by_prv = float(prv.get_epsilon(delta=delta))
    return (("rdp", by_rdp), ("pld", by_pld), ("prv", by_prv))
