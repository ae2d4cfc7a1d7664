"""ε of composed Poisson-sampled Gaussians by Opacus's privacy loss random variables.

Opacus draws a new grid for every composition, and takes 7 s for 100,000 steps. Here its curves lie on grids that stay
the same while a ledger grows, and all of them are multiplied in Fourier space at once, which is the algorithm of the
paper (Gopi, Lee & Wutschitz 2021, arXiv:2106.02848).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from opacus.accountants.analysis.prv import (
    DiscretePRV,
    Domain,
    PoissonSubsampledGaussianPRV,
    TruncatedPrivacyRandomVariable,
    discretize,
)
from scipy.fft import irfft, rfft

from conclave.privacy.accounting.rdp_curves import CurveCache, Pair, epsilon_from_curve, rdp_curves

Spectrum = tuple[NDArray[np.complex128], float]  # and the shift that keeps the mean

_ERROR = 0.01  # in ε, Opacus's default
_TAIL = 9.0  # standard deviations; beyond them lies less than 2e-19
_LARGEST_LOSS = 700.0  # exp overflows beyond
_MOST_POINTS = 2**27  # of all curves of one evaluation together
_MOST_POINTS_EACH = 2**21

_spectra: CurveCache[Spectrum] = CurveCache(points=2**24)  # 128 MiB


class _Bounded(PoissonSubsampledGaussianPRV):  # type: ignore[misc]
    """Opacus's variable, evaluated only where its distribution function is neither 0 nor 1 in floating point."""

    def __init__(self, q: float, sigma: float) -> None:
        super().__init__(q, sigma)
        exponent = (1.0 + 2.0 * _TAIL * sigma) / (2.0 * sigma**2)  # the loss at that tail, were q 1
        self._highest = float(np.logaddexp(math.log1p(-q), math.log(q) + exponent)) if q < 1.0 else exponent
        self._lowest = math.log1p(-q) if q < 1.0 else -math.inf

    def cdf(self, t: Any) -> Any:
        t = np.asarray(t)
        result = np.array(t > self._highest, dtype=np.float64)
        inside = (t > self._lowest) & (t <= self._highest)
        result[inside] = super().cdf(t[inside])
        return result


def prv_epsilon(steps: Mapping[Pair, int], delta: float) -> float | None:
    """Return Opacus's upper bound of ε of a fixed sequence of steps, not empty.

    The error in ε that is added is 0.01 as in Opacus, more where the grid for that would have more than 2^21 points,
    or 2^27 for all curves together. (In δ it is δ/1000.)

    Args:
        steps: (q, σ) → number of steps.

    Returns:
        None where the method has no answer: losses beyond 700 nats, or rounding errors about as large as δ.
    """
    total = sum(steps.values())
    delta_error = delta / 1000.0
    reach = _reach(steps, total, delta_error)
    if reach > _LARGEST_LOSS:
        return None
    spread = math.sqrt(total * math.log(12.0 / delta_error) / 2.0)
    size = 2 ** math.ceil(math.log2(2.0 * reach * spread / _ERROR + 2.0))
    size = max(2**10, min(size, _MOST_POINTS_EACH, 2 ** int(math.log2(_MOST_POINTS / len(steps)))))
    mesh = reach / (size // 2 - 1)
    domain = Domain(t_min=-reach, t_max=reach + mesh, size=size)
    try:
        with warnings.catch_warnings():  # log(0) where q is 1, and at losses that cannot happen
            warnings.simplefilter("ignore")
            return _upper_bound(steps, total, domain, delta, delta_error, max(mesh * spread, _ERROR))
    except (IndexError, RuntimeError, ValueError):  # Opacus saw that its arithmetic does not suffice
        return None


def _reach(steps: Mapping[Pair, int], total: int, delta_error: float) -> float:
    """Half the width of the grid: as Opacus chooses it, up to the next power of √2, so that it seldom moves."""
    curves = rdp_curves(list(steps))
    whole = epsilon_from_curve(np.array(list(steps.values()), dtype=np.float64) @ curves, delta_error / 4.0)
    single = max(epsilon_from_curve(curve, delta_error / (8.0 * total)) for curve in curves)
    reach = max(whole, single, _ERROR) + 3.0
    return 2.0 ** (math.ceil(2.0 * math.log2(reach)) / 2.0) if math.isfinite(reach) else math.inf


def _upper_bound(
    steps: Mapping[Pair, int], total: int, domain: Any, delta: float, delta_error: float, error: float
) -> float | None:
    product = np.ones(domain.size // 2 + 1, dtype=np.complex128)
    shift = 0.0
    for pair, count in steps.items():
        key = (pair, domain.t_max, domain.size)
        spectrum, mean_shift = _spectra.get(key, domain.size, partial(_spectrum, pair, domain))
        product *= spectrum**count
        shift += mean_shift * count
    # Loss 0 stands at index size/2 − 1, so a sum of n indices stands (n − 1) times that too far right.
    pmf = np.roll(irfft(product, domain.size), -(total - 1) * (domain.size // 2 - 1) % domain.size)
    composed = DiscretePRV(pmf=pmf, domain=domain.shift_right(shift))
    _, _, bound = composed.compute_epsilon(delta, delta_error, error)
    return max(0.0, float(bound)) if math.isfinite(bound) else None


def _spectrum(pair: Pair, domain: Any) -> Spectrum:
    discrete = discretize(TruncatedPrivacyRandomVariable(_Bounded(*pair), domain.t_min, domain.t_max), domain)
    return rfft(discrete.pmf), float(discrete.domain.shifts)
