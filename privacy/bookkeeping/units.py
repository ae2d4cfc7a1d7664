"""Which unit of privacy each example of a batch belongs to.

Dimension suffixes: B examples, U units, L rows of a unit (its examples' tokens, zero-padded to the most), D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Units:
    """A batch of ``examples`` that belong to ``count`` units.

    unit_B: int64, unit of each example, ascending; None where every example is a unit of its own.
    """

    examples: int
    count: int
    unit_B: Tensor | None = None

    @staticmethod
    def one_each(examples: int) -> Units:
        """Every example is a unit."""
        return Units(examples, examples)

    def to(self, device: torch.device) -> Units:
        """Return the same on another device."""
        return self if self.unit_B is None else Units(self.examples, self.count, self.unit_B.to(device))

    @cached_property
    def _places(self) -> tuple[Tensor, int]:
        """Each example's place within its unit, and the most examples that a unit has."""
        if self.unit_B is None:
            raise ValueError("every example is a unit of its own")
        size_U = torch.bincount(self.unit_B, minlength=self.count)
        start_U = size_U.cumsum(0) - size_U
        most = int(size_U.max()) if self.count else 0
        return torch.arange(self.examples, device=self.unit_B.device) - start_U[self.unit_B], most

    def rows(self, x: Tensor) -> Tensor:
        """Turn [B, …, D] into [U, L, D]: the rows of each unit, zeros where a unit has fewer examples."""
        if self.unit_B is None:
            return x.reshape(self.examples, -1, x.shape[-1])
        place_B, most = self._places
        padded = x.new_zeros(self.count, most, *x.shape[1:])
        padded[self.unit_B, place_B] = x
        return padded.reshape(self.count, -1, x.shape[-1])

    def add_up(self, x: Tensor) -> Tensor:
        """Turn [B, …] into [U, …] by adding a unit's examples."""
        if self.unit_B is None:
            return x
        return x.new_zeros(self.count, *x.shape[1:]).index_add_(0, self.unit_B, x)

    def of(self, example_N: Tensor) -> Tensor:
        """Return the unit of each row, given its example."""
        return example_N if self.unit_B is None else self.unit_B[example_N]
