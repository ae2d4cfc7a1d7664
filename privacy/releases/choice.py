"""Choosing by the exponential mechanism: which of several things a data set finds most useful."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from conclave.privacy.randomness import uniform_words

SHRINK = 1.0 - 2.0**-10
"""Scores are scaled by it, so that the rounding of their sums cannot carry a unit over its bound."""


def choose(scores_E: Tensor, *, count: int, epsilon: float, sensitivity: float, secret: bytes) -> list[int]:
    """Return ``count`` different indices, the first the most likely to be the best.

    Adding Gumbel noise of scale 2Δ/ε and taking the largest k is the exponential mechanism k times, each time without
    what was taken before (Durfee & Rogers 2019, arXiv:1905.04273).

    Guarantee: ``count`` choices of ε each under add/remove of one unit that moves no score by more than Δ, charged as
    :class:`~conclave.privacy.accounting.mechanisms.ExponentialChoice` with that many choices. Only the order leaves,
    never a score.

    Args:
        scores_E: float64, finite: sums over units of what each gives, within [0, Δ].
        count: from 1 to the number of scores.
        secret: of this choice alone.

    Raises:
        ValueError: a score is not finite, or ``count`` is out of range.
    """
    if not 1 <= count <= len(scores_E) or not bool(torch.isfinite(scores_E).all()):
        raise ValueError("scores must be finite, and at least as many as choices")
    uniform = (uniform_words(secret, len(scores_E)).astype(np.float64) + 0.5) * 2.0**-64
    gumbel = -torch.from_numpy(-np.log(np.minimum(uniform, 1.0 - 2.0**-53))).log()
    noised_E = scores_E.double() * (SHRINK * epsilon / (2.0 * sensitivity)) + gumbel
    return [int(index) for index in noised_E.argsort(descending=True, stable=True)[:count]]
