"""Which examples belong to which unit of privacy: a record each, or all records of a group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from conclave.base.errors import BadInputError
from conclave.privacy.bookkeeping import Units
from conclave.privacy.gradients.physical_batch import Room


@dataclass(frozen=True)
class PhysicalBatch:
    """Examples that are processed at once: whole units, or a part of one unit that is too large for that.

    example_B: int64, their numbers. units: whose they are. of_unit: of a part, how many examples its unit has; None
    where units are whole. last: whether no further part of the unit follows.
    """

    example_B: Tensor
    units: Units
    of_unit: int | None = None
    last: bool = True


class UnitIndex:
    """Looks up the examples of units.

    With groups (a patient's visits, an author's texts) a unit is a group, and only its first ``records_per_unit``
    records take part: a public cap, so that nobody's share of the work is unbounded. Memory is bounded anyway: what is
    larger than the available room is processed in parts.
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

    def batches(self, chosen: Tensor, room: Room, *, alone: bool = False) -> Iterator[PhysicalBatch]:
        """Yield the physical batches of chosen units: those of whole units first, then parts of units too large.

        How a unit is processed, as a whole or in which parts, depends on it and on the room alone.

        Args:
            chosen: int64, ascending.
            alone: each unit comes alone.
        """
        whole = chosen
        if self._start_U is not None:
            fits_U = self._size_U[chosen] <= room.largest_unit
            whole, large = chosen[fits_U], chosen[~fits_U]
        for example_B, unit_B in self.parts(whole, Room(1) if alone else room):
            count = len(example_B) if unit_B is None else int(unit_B[-1]) + 1
            yield PhysicalBatch(example_B, Units(len(example_B), count, unit_B))
        if self._start_U is None:
            return
        for unit in large.tolist():
            example_B, _ = self._part([unit])
            parts = example_B.split(room.examples)
            for number, part_B in enumerate(parts, start=1):
                one = Units(len(part_B), 1, torch.zeros_like(part_B))
                yield PhysicalBatch(part_B, one, len(example_B), number == len(parts))

    def parts(self, chosen: Tensor, most: Room | int) -> list[tuple[Tensor, Tensor | None]]:
        """Cut chosen units into physical batches of at most ``most`` examples; a unit is never split.

        Args:
            chosen: int64, ascending.

        Returns:
            (examples, unit of each example, numbered from 0 within the part; None where each is its own). A unit that
            is larger than ``most`` is a batch of its own.
        """
        room = Room(most) if isinstance(most, int) else most
        if self._start_U is None:
            return [(part, None) for part in chosen.split(room.examples)] if len(chosen) else []
        parts: list[tuple[Tensor, Tensor | None]] = []
        mine, examples, largest = list[int](), 0, 0
        # The largest first: a batch's units are padded to one size.
        size_U, order_U = self._size_U[chosen].sort(descending=True, stable=True)
        for unit, size in zip(chosen[order_U].tolist(), size_U.tolist(), strict=True):
            too_many = examples + size > room.examples or not room.holds(len(mine) + 1, largest)
            if mine and too_many:
                parts.append(self._part(mine))
                mine, examples = [], 0
            largest = size if not mine else largest
            mine.append(unit)
            examples += size
        return [*parts, self._part(mine)] if mine else parts

    def _part(self, units: list[int]) -> tuple[Tensor, Tensor]:
        if self._start_U is None:
            raise RuntimeError("records are their own units")
        example, unit = [], []
        for number, u in enumerate(units):
            size, start = int(self._size_U[u]), int(self._start_U[u])
            example.append(self._order_B[start : start + size])
            unit.append(torch.full((size,), number))
        return torch.cat(example), torch.cat(unit)
