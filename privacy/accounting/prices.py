"""What charges cost: their RDP at one order.

The canonical form of a mechanism is a ``dp_accounting.DpEvent``. Who reads a ledger without pricing it does without
this: dp-accounting and what it loads take more time than everything else of a ledger together.
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
from conclave.privacy.accounting.filter import UNITS_PER_NAT
from conclave.privacy.accounting.mechanisms import SMALLEST_NOISE, ExponentialChoice, Mechanism, SampledGaussian
from conclave.privacy.accounting.order_bound import or_bound, rdp_bound

NEIGHBORS = dpa.NeighboringRelation.ADD_OR_REMOVE_ONE
_RELATIVE_SLACK = 1e-9  # covers the floating-point error of one RDP evaluation, on the private side
_SERIES_SLACK = 1e-13
"""Of a log-moment: dp-accounting's sums of about 1 stop at terms of e^-30, and near 0 even come out below 0."""


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


def event_of(mechanism: SampledGaussian) -> dpa.DpEvent:
    """Return a mechanism as a dp-accounting event."""
    gaussian = dpa.GaussianDpEvent(mechanism.noise_multiplier)
    sampled = dpa.PoissonSampledDpEvent(mechanism.sampling_rate, gaussian)
    return dpa.SelfComposedDpEvent(sampled if mechanism.sampling_rate < 1.0 else gaussian, mechanism.steps)


@lru_cache(maxsize=65_536)
def _upper_bounds(mechanism: SampledGaussian, order: float) -> tuple[float, float]:
    """The RDP of all steps by dp-accounting, inf where its series does not converge, and by our own bound."""
    if mechanism.noise_multiplier < SMALLEST_NOISE:
        raise BadInputError(f"a noise multiplier of {mechanism.noise_multiplier} costs more than any budget")
    q, sigma = np.array([mechanism.sampling_rate]), np.array([mechanism.noise_multiplier])
    return _rdp(event_of(mechanism), order), mechanism.steps * float(rdp_bound(q, sigma, [order])[0, 0])


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
