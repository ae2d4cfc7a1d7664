"""Poisson sampling of units at a public rate."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from conclave.privacy.randomness import derive, uniform_words


def poisson_sample(units: int, rate: float, secret: bytes, step: int) -> Tensor:
    """Return the indices of the sampled units, ascending, int64; possibly none.

    Each unit enters independently with probability ``rate`` (rounded down to a multiple of 2^-53). Unit i's
    draw is a function of (secret, step, i), so adding or removing another unit changes nothing for i.

    Privacy: ``rate`` is public; the size of the sample is not, and must not leave the node.
    """
    if rate >= 1.0:
        return torch.arange(units)
    words = uniform_words(derive(secret, "sampling", step), units)
    chosen = (words >> np.uint64(11)) < np.uint64(int(rate * 2.0**53))
    return torch.from_numpy(np.flatnonzero(chosen))
