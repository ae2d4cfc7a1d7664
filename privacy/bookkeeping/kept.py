"""A layer's input as the forward pass saw it, shared by all layers that saw it."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from conclave.privacy.bookkeeping.factor import Factor
from conclave.privacy.bookkeeping.units import Units


def widened(x: Tensor) -> Tensor:
    """Return float32 for narrower floats: norms and sums never run in reduced precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class Kept:
    """One input tensor, and what layers want to know of it."""

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
