"""A metric's mean over units, released with noise: the sum of the values v, and the sum of 1 − v.

A unit contributes (v, 1 − v) with v in [0, 1], whose L2 norm is at most 1; a group contributes the mean of its
records' v. The first sum over both together is the mean over units: neither the number of units nor the mean has to be
known, and the noise of a number that is known to be near 1 or 0 does not enter twice.

Contributions are whole steps of 2^-30, rounded toward zero and summed in integers, and noise is rounded onto the same
grid, at every numeric level, as in :mod:`conclave.privacy.releases.load_histogram`.

Dimension suffixes: B examples, U units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from conclave.privacy.randomness import standard_normal

if TYPE_CHECKING:  # a plan is priced by the sensitivity alone
    from conclave.privacy.bookkeeping import Units

GRID_BITS = 30
SENSITIVITY = 1.0
"""By how much one unit moves the two sums together, L2: √(v² + (1 − v)²) ≤ 1."""

_ONE = 1 << GRID_BITS
_FEWEST_DEVIATIONS = 3.0


class MetricSums:
    """Adds up the values of one metric over units. What it holds before the noise never leaves."""

    def __init__(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.int64)
        self._part = torch.zeros((), dtype=torch.int64)

    def add(self, value_B: Tensor, units: Units) -> None:
        """Add examples' values, shape [B]; values outside [0, 1] are moved to its ends, and NaN to 0."""
        value_U = _steps(value_B)
        if units.unit_B is not None:
            unit_B = units.unit_B.cpu()
            size_U = torch.bincount(unit_B, minlength=units.count)
            value_U = value_U.new_zeros(units.count).index_add_(0, unit_B, value_U) // size_U
        self._sums += torch.stack([value_U.sum(), (_ONE - value_U).sum()])

    def add_part(self, value_B: Tensor, unit_size: int | None) -> None:
        """Add the values of some examples of one unit, which counts with its last part.

        Args:
            unit_size: examples of the unit, after its last part; None before.
        """
        self._part += _steps(value_B).sum()
        if unit_size is not None:
            mean = self._part // unit_size
            self._sums += torch.stack([mean, _ONE - mean])
            self._part.zero_()

    def exact(self) -> Tensor:
        """Return both sums without noise, float64 [2]: for audits. Never release them."""
        return self._sums.double() * 2.0**-GRID_BITS

    def noised(self, noise_multiplier: float | None, secret: bytes) -> Tensor:
        """Return both sums, float32 [2].

        Guarantee: the Gaussian mechanism of ``noise_multiplier`` under add/remove of one unit. None adds no noise.

        Args:
            secret: of this release alone.
        """
        total = self._sums.double()
        if noise_multiplier is not None:
            total += standard_normal(secret, 2).mul_(noise_multiplier * SENSITIVITY * 2.0**GRID_BITS).round_()
        return (total * 2.0**-GRID_BITS).float()


def _steps(value_B: Tensor) -> Tensor:
    """Return values in [0, 1] in whole steps of the grid, rounded toward zero."""
    value_B = torch.nan_to_num(value_B.detach().cpu().double(), nan=0.0).clamp(0.0, 1.0)
    return (value_B * _ONE).floor().long()


@dataclass(frozen=True)
class PrivateMean:
    """A metric's mean over units as noised sums tell it.

    noise: the standard error that the noise alone gives it.
    """

    value: float
    noise: float


def private_mean(sums: tuple[float, float], noise: float) -> PrivateMean | None:
    """Return the mean that noised sums (of the values, of what they lack to 1) imply; None if it drowns in noise.

    Args:
        noise: standard deviation of the noise in each of the two sums: σ, or σ√n for the sums of n nodes.
    """
    units = sums[0] + sums[1]
    if units <= _FEWEST_DEVIATIONS * math.sqrt(2.0) * noise or units <= 0.0:
        return None
    mean = min(max(sums[0] / units, 0.0), 1.0)
    return PrivateMean(mean, noise * math.hypot(mean, 1.0 - mean) / units)
