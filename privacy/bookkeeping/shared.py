"""What several layers may share: an input as the forward pass saw it, and one side of a gradient Σ_t x_t ⊗ δ_t.

Query, key and value layers see the same input, and so do the experts' up and gate layers: norms and Gram matrix of a
shared input are computed once.

Dimension suffixes: U units, L rows of a unit, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from conclave.privacy.bookkeeping.certificate import row_norms
from conclave.privacy.bookkeeping.units import Units


class Factor:
    """Inputs or output gradients of a dense layer by unit: rows_ULD, float32 or wider, zero where padded."""

    def __init__(self, rows_ULD: Tensor) -> None:
        self.rows_ULD = rows_ULD

    @cached_property
    def norms(self) -> Tensor:
        """Norms of the rows, float32, rounded up for underflow."""
        return row_norms(self.rows_ULD)

    @cached_property
    def gram(self) -> Tensor:
        """Products of all pairs of rows of a unit."""
        return torch.bmm(self.rows_ULD, self.rows_ULD.transpose(1, 2))


def joined(factors: Sequence[Factor]) -> Factor:
    """Put the rows of several uses of one parameter side by side."""
    return Factor(torch.cat([factor.rows_ULD for factor in factors], dim=1))


def widened(x: Tensor) -> Tensor:
    """Return float32 for narrower floats: norms and sums never run in reduced precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class Kept:
    """A layer's input, shared by all layers that saw it, and what they want to know of it."""

    def __init__(self, x: Tensor, units: Units) -> None:
        self._x, self._units = x, units
        self._version = x._version

    def unchanged(self) -> bool:
        """Whether nobody changed it in place since."""
        return self._x._version == self._version

    @cached_property
    def value(self) -> Tensor:
        """The tensor without its graph, floats as float32 or wider."""
        return widened(self._x.detach())

    @cached_property
    def factor(self) -> Factor:
        """Its rows by unit."""
        return Factor(self._units.rows(self.value))
