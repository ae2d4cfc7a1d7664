"""Which examples belong to which unit of privacy: a record each, or all records of a group."""

from __future__ import annotations

import torch
from torch import Tensor

from model.errors import BadInputError


class UnitIndex:
    """Looks up the examples of units.

    With groups (a patient's visits, an author's texts) a unit is a group, and only its first ``records_per_unit``
    records take part: a public cap, so that nobody's share of the work or memory is without bound.
    """

    def __init__(self, examples: int, group_B: Tensor | None = None, records_per_unit: int | None = None) -> None:
        """Index ``examples`` records.

        Args:
            group_B: int64, the group of each record; None where each is a unit of its own.

        Raises:
            BadInputError: groups without a cap, or not one group per record.
        """
        self.examples = examples
        self.count = examples
        self._start_U: Tensor | None = None
        if group_B is None:
            return
        if records_per_unit is None:
            raise BadInputError("records_per_unit must be set where groups are the unit of privacy")
        if group_B.shape != (examples,) or group_B.dtype != torch.int64:
            raise BadInputError("groups must be one 64-bit integer per record")
        self._order_B = torch.argsort(group_B, stable=True)
        _, size_U = torch.unique_consecutive(group_B[self._order_B], return_counts=True)
        self._start_U = size_U.cumsum(0) - size_U
        self._size_U = size_U.clamp(max=records_per_unit)
        self.count = len(size_U)

    @property
    def grouped(self) -> bool:
        """Whether a unit is a group."""
        return self._start_U is not None

    def parts(self, chosen: Tensor, most: int) -> list[tuple[Tensor, Tensor | None]]:
        """Cut chosen units into physical batches of at most ``most`` examples; a unit is never split.

        Args:
            chosen: int64, ascending.

        Returns:
            (examples, unit of each example, numbered from 0 within the part; None where each is its own).
        """
        if self._start_U is None:
            return [(part, None) for part in chosen.split(most)] if len(chosen) else []
        parts: list[tuple[Tensor, Tensor | None]] = []
        mine, examples = list[int](), 0
        for unit, size in zip(chosen.tolist(), self._size_U[chosen].tolist(), strict=True):
            if mine and examples + size > most:
                parts.append(self._part(mine))
                mine, examples = [], 0
            mine.append(unit)
            examples += size
        return [*parts, self._part(mine)] if mine else parts

    def _part(self, units: list[int]) -> tuple[Tensor, Tensor | None]:
        if self._start_U is None:
            raise RuntimeError("records are their own units")
        example, unit = [], []
        for number, u in enumerate(units):
            size, start = int(self._size_U[u]), int(self._start_U[u])
            example.append(self._order_B[start : start + size])
            unit.append(torch.full((size,), number))
        return torch.cat(example), torch.cat(unit)
