"""Every unit of a node's records once, without sampling: for choices and metrics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from conclave.data.sources import GROUP
from conclave.model.records import Batch, Records
from conclave.privacy.gradients.physical_batch import Room
from conclave.privacy.gradients.unit_index import PhysicalBatch, UnitIndex
from conclave.protocol.plan import Plan

log = logging.getLogger("conclave.node")

_Found = TypeVar("_Found")


def whole_pass(plan: Plan, records: Records, room: Room) -> Iterator[tuple[PhysicalBatch, Batch]]:
    """Yield physical batches, and their examples without the numbers of groups, which no model sees.

    At level strict each unit comes alone.

    Args:
        room: how much is processed at once, from public shapes.
    """
    count = len(next(iter(records.values())))
    index = UnitIndex(count, records[GROUP] if plan.privacy.unit == "group" else None, plan.privacy.records_per_unit)
    inputs = {name: tensor for name, tensor in records.items() if name != GROUP}
    for physical in index.batches(torch.arange(index.count), room, alone=plan.privacy.numeric == "strict"):
        yield physical, {name: tensor[physical.example_B] for name, tensor in inputs.items()}


def contained(run: Callable[[Tensor, Batch], _Found], example_B: Tensor, batch: Batch) -> Iterator[_Found | None]:
    """Yield what ``run`` makes of a physical batch; if that fails, of each example alone, or None if that fails too.

    The model was tried on made-up records before anything was charged: what fails now depends on records, and must not
    show in whether the node answers.
    """
    try:
        whole = run(example_B, batch)
    except Exception:
        for number in range(len(example_B)):
            one = slice(number, number + 1)
            try:
                yield run(example_B[one], {name: tensor[one] for name, tensor in batch.items()})
            except Exception:
                log.exception("a record could not be processed; it counts as nothing")
                yield None
        return
    yield whole
