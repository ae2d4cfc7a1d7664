"""ε of composed Poisson-sampled Gaussians by dp-accounting's privacy loss distributions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.pld.privacy_loss_mechanism import GaussianPrivacyLoss

from conclave.privacy.accounting.prices import NEIGHBORS
from conclave.privacy.accounting.rdp_curves import CurveCache, Pair, epsilon_from_curve, rdp_curves

_FINEST_INTERVAL = 1e-4  # dp-accounting's default
_MANY, _AT_ONCE = 100_000, 1000
_TRUNCATED = 1e-15  # dp-accounting's default
_COARSEST_INTERVAL = 0.1
_MOST_POINTS = 2**23  # of all curves of one evaluation together, both directions

_curves: CurveCache[pld.PrivacyLossDistribution] = CurveCache(points=2**24)  # 128 MiB


def pld_epsilon(steps: Mapping[Pair, int], delta: float) -> float | None:
    """Return an upper bound of ε of a fixed sequence of steps, not empty.

    Losses are rounded pessimistically ("connect the dots": Doroshenko et al. 2022, arXiv:2207.04380) to multiples of
    1e-4, or of the least 1e-4·2^k with which all curves together, and what they compose to, stay within 2^23 points.

    Args:
        steps: (q, σ) → number of steps.

    Returns:
        None where the losses are so wide that such an interval would exceed 0.1.
    """
    spans = {pair: _span(*pair) for pair in steps}
    interval = _FINEST_INTERVAL
    widest = max(sum(spans.values()), _reach(steps))
    while 2.0 * widest / interval > _MOST_POINTS:
        interval *= 2.0
        if interval > _COARSEST_INTERVAL:
            return None
    composed = []
    for (q, sigma), count in steps.items():
        curve = _curves.get(
            (q, sigma, interval),
            int(2.0 * spans[q, sigma] / interval) + 1,
            partial(
                pld.from_gaussian_mechanism,
                standard_deviation=sigma,
                sampling_prob=q,
                value_discretization_interval=interval,
                neighboring_relation=NEIGHBORS,
            ),
        )
        composed.append(_self_compose(curve, count))
    while len(composed) > 1:  # as a tree: most convolutions stay small
        pairs = zip(composed[::2], composed[1::2], strict=False)
        composed = [left.compose(right) for left, right in pairs] + composed[len(composed) // 2 * 2 :]
    return float(composed[0].get_epsilon_for_delta(delta))


def _self_compose(curve: Any, count: int) -> Any:
    """Compose a curve with itself; dp-accounting first raises the size of a small one to the power ``count``."""
    if count < _MANY:
        return curve.self_compose(count)
    whole, rest = divmod(count, _AT_ONCE)
    result = curve.self_compose(_AT_ONCE).self_compose(whole)
    return result.compose(curve.self_compose(rest)) if rest else result


def _reach(steps: Mapping[Pair, int]) -> float:
    """The loss in nats that the composition exceeds with the probability at which dp-accounting truncates."""
    counts = np.array(list(steps.values()), dtype=np.float64)
    return epsilon_from_curve(counts @ rdp_curves(list(steps)), _TRUNCATED)


def _span(q: float, sigma: float) -> float:
    """The width in nats of the losses that a curve must hold."""
    bounds = GaussianPrivacyLoss(sigma, sampling_prob=q).connect_dots_bounds()
    return float(bounds.epsilon_upper - bounds.epsilon_lower)
