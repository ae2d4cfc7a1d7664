"""The factors with which units enter a sum, applied by selection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """One factor per unit, float64 [U]; ``all_used``: none of them is 0, so nothing needs to be selected.

    A unit whose factor is 0 may hold NaN or infinities, and 0·inf is NaN: it is left out, not multiplied.
    """

    factor_U: Tensor
    all_used: bool

    @staticmethod
    def of(factor_U: Tensor) -> Weights:
        """Look once whether any is 0."""
        return Weights(factor_U, bool((factor_U > 0).all()))

    def apply(self, x: Tensor, unit_N: Tensor | None = None) -> Tensor:
        """Scale the leading axis of x: units, or rows whose units are ``unit_N``."""
        factor = self._spread(self.factor_U, unit_N, x)
        return x * factor if self.all_used else torch.where(factor > 0, x * factor, 0.0)

    def select(self, x: Tensor, unit_N: Tensor | None = None) -> Tensor:
        """Zero the leading axis of x where the factor is 0 and leave the rest: the other side of a product."""
        if self.all_used:
            return x
        return torch.where(self._spread(self.factor_U, unit_N, x) > 0, x, 0.0)

    def total(self, gradient_U: Tensor) -> Tensor:
        """Return Σ_u factor_u · g_u for gradients [U, *shape]."""
        factor_U = self.factor_U
        if not self.all_used:
            keep_U = factor_U > 0
            gradient_U, factor_U = gradient_U[keep_U], factor_U[keep_U]
        shape = gradient_U.shape[1:]
        return (factor_U.to(gradient_U.dtype) @ gradient_U.reshape(-1, shape.numel())).view(shape)

    @staticmethod
    def _spread(factor_U: Tensor, unit_N: Tensor | None, x: Tensor) -> Tensor:
        factor = factor_U if unit_N is None else factor_U[unit_N]
        return factor.to(x.dtype).view(-1, *(1,) * (x.dim() - 1))
