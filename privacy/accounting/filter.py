"""The filter that enforces a budget, which a charge's price counts against.

A budget (ε, δ) is enforced with Rényi differential privacy at ONE order α, fixed when the ledger is created: the sum of
the charges' RDP at α may not exceed ``ε − conversion(α, δ)``. That sum is valid for adaptively chosen charges (Feldman
& Zrnic 2021, arXiv:2008.11193), where a PLD curve is not a stopping rule. RDP is counted in whole units of 1e-12;
charges round up (:mod:`conclave.privacy.accounting.prices`) and budgets round down.
"""

from __future__ import annotations

import math
from functools import lru_cache

from conclave.base.errors import BadInputError

UNITS_PER_NAT = 10**12


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
