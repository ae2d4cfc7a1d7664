"""What charges cost, and the filter that enforces a budget.

The canonical form of a mechanism is a ``dp_accounting.DpEvent``. A budget (ε, δ) is enforced with Rényi
differential privacy at ONE order α, fixed when the ledger is created: the sum of the charges' RDP at α may
not exceed ``ε − conversion(α, δ)``. That sum is valid for adaptively chosen charges (Feldman & Zrnic 2021,
arXiv:2008.11193), where a PLD curve is not a stopping rule. RDP is counted in whole units of 1e-12; charges
round up and budgets round down.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from functools import lru_cache

import dp_accounting as dpa
import numpy as np
from dp_accounting import rdp

from conclave.base.errors import BadInputError
from conclave.privacy.accounting.mechanisms import (
    NEIGHBORS,
    SMALLEST_NOISE,
    ExponentialChoice,
    Mechanism,
    SampledGaussian,
)
from conclave.privacy.accounting.order_bound import or_bound, rdp_bound

UNITS_PER_NAT = 10**12
_RELATIVE_SLACK = 1e-9  # covers the floating-point error of one RDP evaluation, on the private side
_SERIES_SLACK = 1e-13
"""Of a log-moment: dp-accounting's sums of about 1 stop at terms of e^-30, and near 0 even come out below 0."""


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


def charge_units(mechanism: Mechanism, order: float) -> int:
    """Return what a charge costs at ``order``: its RDP plus a margin for rounding, rounded up; at least 1.

    Raises:
        BadInputError: the RDP is not finite (σ so small that no budget could pay for it).
    """
    if isinstance(mechanism, ExponentialChoice):
        upper = mechanism.rdp(order) * (1.0 + _RELATIVE_SLACK)
    else:
        by_series, bound = _upper_bounds(mechanism, order)
        margin = max(_RELATIVE_SLACK * by_series, mechanism.steps * _SERIES_SLACK / (order - 1.0))
        upper = float(or_bound(by_series + margin, bound * (1.0 + _RELATIVE_SLACK)))
    return max(1, math.ceil(upper * UNITS_PER_NAT))


def rdp_at(mechanism: Mechanism, order: float) -> float:
    """Return the RDP of a charge at ``order`` in nats, at least 0.

    For Gaussians as dp-accounting computes it, unless :func:`~conclave.privacy.accounting.order_bound.rdp_bound` is
    clearly smaller: dp-accounting's series of a fractional order has a floor (at σ = 100, q = 0.5 and order 3.4 it is
    46 times too large), or does not converge.

    Raises:
        BadInputError: see :func:`charge_units`.
    """
    if isinstance(mechanism, ExponentialChoice):
        return mechanism.rdp(order)
    return max(0.0, float(or_bound(*_upper_bounds(mechanism, order))))


@lru_cache(maxsize=65_536)
def _upper_bounds(mechanism: SampledGaussian, order: float) -> tuple[float, float]:
    """The RDP of all steps by dp-accounting, inf where its series does not converge, and by our own bound."""
    if mechanism.noise_multiplier < SMALLEST_NOISE:
        raise BadInputError(f"a noise multiplier of {mechanism.noise_multiplier} costs more than any budget")
    q, sigma = np.array([mechanism.sampling_rate]), np.array([mechanism.noise_multiplier])
    return _rdp(mechanism.event, order), mechanism.steps * float(rdp_bound(q, sigma, [order])[0, 0])


def _rdp(event: dpa.DpEvent, order: float) -> float:
    with _quiet_absl():
        accountant = rdp.RdpAccountant(orders=[order], neighboring_relation=NEIGHBORS).compose(event)
    return float(accountant._rdp[0])


@contextlib.contextmanager
def _quiet_absl() -> Iterator[None]:
    """Silence dp-accounting's warning about non-convergence, which the caller handles."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
