"""Learned values applied element by element. They are layers, so that their gradients can be computed per unit."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Scale(nn.Module):
    """Multiplies by a learned scalar, or by a learned tensor that is broadcast over the leading axes."""

    def __init__(self, *shape: int, value: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full(shape, value))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x · weight``; ``x`` is [B, …, *shape]."""
        return x * self.weight
