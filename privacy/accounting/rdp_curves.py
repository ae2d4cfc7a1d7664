"""RDP of Poisson-sampled Gaussians at all of dp-accounting's default orders, many (q, σ) at a time.

The same sums as dp-accounting's (Mironov, Talwar & Zhang 2019, arXiv:1908.10530, section 3.3), over arrays instead of
term by term: 10,000 curves take seconds, not ten minutes. If such a sum at a fractional order cannot be used,
:func:`~conclave.privacy.accounting.order_bound.rdp_bound` stands for it, as in the ledger's prices. For reading only: a
price comes from :func:`conclave.privacy.accounting.prices.rdp_at`, which asks dp-accounting itself.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import numpy as np
from dp_accounting import rdp
from numpy.typing import NDArray
from scipy.special import gammaln, log_ndtr, logsumexp

from conclave.privacy.accounting.order_bound import or_bound, rdp_bound

Pair = tuple[float, float]  # (q, σ)
Array = NDArray[np.float64]

ORDERS: Array = np.array(rdp.rdp_privacy_accountant.DEFAULT_RDP_ORDERS, dtype=np.float64)

_WHOLE = np.flatnonzero(ORDERS % 1.0 == 0.0)
_BROKEN = np.flatnonzero(ORDERS % 1.0 != 0.0)
_MOST_TERMS = 1000  # where dp-accounting gives a fractional order up
_NEGLIGIBLE = 30.0  # nats below the sum, as in dp-accounting
_TERMS = 24
_TOGETHER = 64  # pairs in one array: temporaries stay within the processor's cache
_MOST_KEPT = 20_000  # curves, 1.3 kB each

_kept: OrderedDict[Pair, Array] = OrderedDict()

Curve = TypeVar("Curve")


def rdp_curves(pairs: Sequence[Pair]) -> Array:
    """Return the RDP in nats of one step of each (q, σ) at :data:`ORDERS`, [pairs, orders].

    Each is an upper bound, also where the series of a fractional order does not converge, which dp-accounting answers
    with inf. Curves are kept for the next call.
    """
    missing = [pair for pair in dict.fromkeys(pairs) if pair not in _kept]
    fresh: dict[Pair, Array] = {}
    for start in range(0, len(missing), _TOGETHER):
        some = missing[start : start + _TOGETHER]
        fresh.update(zip(some, _compute(some), strict=True))
    result = np.array([fresh[pair] if pair in fresh else _kept[pair] for pair in pairs]).reshape(-1, len(ORDERS))
    _kept.update(fresh)
    while len(_kept) > _MOST_KEPT:
        _kept.popitem(last=False)
    return result


def _compute(pairs: Sequence[Pair]) -> Array:
    q_P, sigma_P = np.array(pairs, dtype=np.float64).T
    curves: Array = ORDERS / (2.0 * sigma_P[:, None] ** 2)  # without sampling
    sampled = q_P < 1.0
    if sampled.any():
        logs = np.empty((int(sampled.sum()), len(ORDERS)))
        for column in _WHOLE:
            logs[:, column] = _log_moment_whole(q_P[sampled], sigma_P[sampled], int(ORDERS[column]))
        logs[:, _BROKEN] = _log_moments_broken(q_P[sampled], sigma_P[sampled], ORDERS[_BROKEN])
        sums = logs / (ORDERS - 1.0)
        bounds = rdp_bound(q_P[sampled], sigma_P[sampled], ORDERS[_BROKEN].tolist())
        sums[:, _BROKEN] = or_bound(sums[:, _BROKEN], bounds)
        curves[sampled] = sums
    return curves


def _log_moment_whole(q_P: Array, sigma_P: Array, order: int) -> Array:
    """The finite binomial sum of a whole order."""
    i = np.arange(order + 1.0)
    chosen = _log_comb(float(order), i) + i * np.log(q_P)[:, None] + (order - i) * np.log1p(-q_P)[:, None]
    total: Array = logsumexp(chosen + (i * i - i) / (2.0 * sigma_P[:, None] ** 2), axis=1)
    return total


def _log_moments_broken(q_P: Array, sigma_P: Array, orders_A: Array) -> Array:
    """The two infinite series of a fractional order, in blocks of terms until both are negligible."""
    pair = np.repeat(np.arange(len(q_P)), len(orders_A))
    order = np.tile(orders_A, len(q_P))
    total = np.full(pair.shape, -np.inf)
    open_ = np.arange(len(pair))  # which sums still grow
    for start in range(0, _MOST_TERMS, _TERMS):
        i = np.arange(start, min(start + _TERMS, _MOST_TERMS), dtype=np.float64)
        series = _terms(q_P[pair[open_], None], sigma_P[pair[open_], None], order[open_, None], i)
        total[open_] = np.logaddexp(total[open_], logsumexp(np.concatenate(series, axis=1), axis=1))
        done = np.ones(len(open_), dtype=bool)
        for terms in series:
            done &= (terms[:, -1] < terms[:, -2]) & (terms[:, -1] < total[open_] - _NEGLIGIBLE)
        open_ = open_[~done]
        if not len(open_):
            break
    total[open_] = np.inf
    return total.reshape(len(q_P), len(orders_A))


def _terms(q: Array, sigma: Array, order: Array, i: Array) -> tuple[Array, Array]:
    """Logarithms of the terms ``i`` of both series; dp-accounting adds their magnitudes."""
    j = order - i
    z = sigma**2 * np.log(1.0 / q - 1.0) + 0.5
    log_q, log_rest, choose = np.log(q), np.log1p(-q), _log_comb(order, i)
    below = choose + i * log_q + j * log_rest + (i * i - i) / (2.0 * sigma**2) + log_ndtr((z - i) / sigma)
    above = choose + j * log_q + i * log_rest + (j * j - j) / (2.0 * sigma**2) + log_ndtr((j - z) / sigma)
    return below, above


def _log_comb(n: Array | float, k: Array) -> Array:
    result: Array = gammaln(n + 1.0) - gammaln(k + 1.0) - gammaln(n - k + 1.0)
    return result


def epsilon_from_curve(curve: Array, delta: float) -> float:
    """Return the least ε over all orders that a composed curve implies (Canonne et al. 2020, arXiv:2004.00010)."""
    return float(rdp.compute_epsilon(ORDERS, curve, delta)[0]) if math.isfinite(curve.min()) else math.inf


class CurveCache(Generic[Curve]):
    """A store for computed curves of any kind: it keeps what was used last, up to ``points`` numbers in all."""

    def __init__(self, points: int) -> None:
        self._room = points
        self._held = 0
        self._curves: OrderedDict[Hashable, tuple[Curve, int]] = OrderedDict()

    def get(self, key: Hashable, points: int, build: Callable[[], Curve]) -> Curve:
        """Return the curve of ``key``, built if it is not held; ``points`` is its size."""
        found = self._curves.get(key)
        if found is not None:
            self._curves.move_to_end(key)
            return found[0]
        curve = build()
        self._curves[key] = (curve, points)
        self._held += points
        while self._held > self._room and len(self._curves) > 1:
            _, (_, dropped) = self._curves.popitem(last=False)
            self._held -= dropped
        return curve
