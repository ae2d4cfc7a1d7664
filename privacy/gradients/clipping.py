"""Clip factors: how much of each unit's gradient enters the sum.

Every kind keeps the joint L2 norm of a unit's contribution, over all trained parameters, within the clip bound C. All
are computed from upper bounds of norms, and shrunk by 2^-10 so that rounding cannot carry a contribution over C.

* flat: min(1, C/‖g‖) for the whole gradient (Abadi et al. 2016, arXiv:1607.00133).
* per-layer: each of P parameter tensors is clipped to C/√P by itself.
* automatic: C/(‖g‖ + 0.01): normalise instead of clipping, no bound to tune (Bu et al. 2022, arXiv:2206.07136).
* adaptive: flat with a C that follows a quantile of the norms (Andrew et al. 2021, arXiv:1905.03871).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from conclave.base.allowed import check_number, check_word

LARGEST_NORM = 2.0**60
SMALLEST_CLIP = 1e-12
"""Far enough above it that no factor is a subnormal float32, which would be rounded by more than the slack."""
SHRINK = 1.0 - 2.0**-10
STABILISER = 0.01

ClipKind = Literal["flat", "per-layer", "automatic", "adaptive"]


def clip_factors(norm_B: Tensor, clip: float) -> Tensor:
    """Return the factor of each unit, float64: ``min(1, clip·(1 − 2^-10)/norm)``, and 0 where unusable.

    Args:
        norm_B: float64 norms, ≥ 0; a value that is not finite or exceeds 2^60 gives factor 0.
    """
    usable_B = usable(norm_B)
    safe_B = torch.where(usable_B, norm_B, 1.0)
    factor_B = (clip * SHRINK / safe_B.clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1.0)
    return torch.where(usable_B, factor_B, 0.0)


def usable(norm_B: Tensor) -> Tensor:
    """Which units may enter a sum: NaN, infinities and norms above 2^60 may not."""
    return norm_B.isfinite() & (norm_B <= LARGEST_NORM)


def unit_factors(squared_PU: Tensor, kind: ClipKind, clip: float, parameters: int) -> Tensor:
    """Return the factor of each parameter's gradient of each unit, float64 [P, U].

    Args:
        squared_PU: upper bounds of squared norms, float64, of the parameters that a unit may have reached.
        parameters: how many are trained, reached or not: public, unlike the number of rows.

    Raises:
        BadInputError: there is no such kind.
    """
    norm_U = squared_PU.sum(0).sqrt()
    check_word("clipping", kind, get_args(ClipKind))
    if kind == "per-layer":
        factor_PU = clip_factors(squared_PU.sqrt(), clip / math.sqrt(parameters))
        return torch.where(usable(norm_U), factor_PU, 0.0)  # a unit is in or out as a whole
    if kind == "automatic":
        factor_U = clip * SHRINK / (torch.where(usable(norm_U), norm_U, 1.0) + STABILISER)
        factor_U = torch.where(usable(norm_U), factor_U, 0.0)
    else:
        factor_U = clip_factors(norm_U, clip)
    return factor_U.expand_as(squared_PU)


@dataclass(frozen=True)
class AdaptiveClip:
    """The public rule by which C follows a quantile of the norms.

    C ← max(lowest, C·exp(−rate·(share − quantile))), where the share of units within C is noised: a unit adds +½ or −½
    to the count, so its sensitivity is ½. The count comes from the sample of the gradient and is one event with it:
    with noise multipliers z of the whole and s of the count (relative to 1), the gradient is left
    (z⁻² − (2s)⁻²)^-½, a little more than z.
    """

    quantile: float = 0.5
    rate: float = 0.2
    lowest: float = 1e-3

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            BadInputError: a number out of range.
        """
        check_number("quantile", self.quantile, 0.0, 1.0)
        check_number("rate", self.rate, 0.0, 10.0)
        check_number("lowest", self.lowest, SMALLEST_CLIP, LARGEST_NORM)

    @staticmethod
    def count_noise(noise_multiplier: float, divisor: float) -> float:
        """Return the standard deviation of the count's noise.

        A twentieth of the expected batch, but never so small that most of the precision would go to the count.
        """
        return max(divisor / 20.0, noise_multiplier)

    @classmethod
    def gradient_noise_multiplier(cls, noise_multiplier: float, divisor: float) -> float:
        """What is left for the gradient, so that both together have ``noise_multiplier``."""
        count = cls.count_noise(noise_multiplier, divisor)
        return 1.0 / math.sqrt(noise_multiplier**-2 - (2.0 * count) ** -2)

    def next(self, clip: float, noisy_count: float, divisor: float) -> float:
        """Return the next C from the noised sum of ±½."""
        share = min(max(noisy_count / divisor + 0.5, 0.0), 1.0)
        return max(self.lowest, clip * math.exp(-self.rate * (share - self.quantile)))
