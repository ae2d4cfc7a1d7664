"""A public bank of oriented filters, where a first convolution may start instead of at random ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WIDTH = 3 / 16
"""Standard deviation of the Gaussian, as a share of the kernel's side: its edges lie 2⅔ of them from its middle."""


def oriented_filters(count: int, side: int) -> Tensor:
    """Return ``count`` filters, float64 [count, side, side], each of mean zero and norm one.

    Filter 2i is the first, filter 2i + 1 the second derivative of a Gaussian along the same direction, which turns by
    equal angles through half a turn: edges and lines (Freeman and Adelson 1991, doi:10.1109/34.93808).

    Args:
        side: of a filter, at least 3: on 2 × 2 values a second derivative is constant.
    """
    at = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    squared_width = (_WIDTH * side) ** 2
    filters = torch.empty(count, side, side, dtype=torch.float64)
    for number in range(count):
        angle = math.pi * (number // 2) / ((count + 1) // 2)
        along = math.cos(angle) * at + math.sin(angle) * at[:, None]
        bell = torch.exp(-(at.square() + at[:, None].square()) / (2 * squared_width))
        filters[number] = bell * (along if number % 2 == 0 else along.square() / squared_width - 1.0)
    filters -= filters.mean(dim=(1, 2), keepdim=True)
    filters /= torch.linalg.vector_norm(filters, dim=(1, 2), keepdim=True)
    return filters
