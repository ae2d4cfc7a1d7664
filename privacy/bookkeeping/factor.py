"""One side of a per-unit gradient Σ_t x_t ⊗ δ_t, with what several layers may share of it.

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
