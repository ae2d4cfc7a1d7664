"""Every unit of a node's records once, without sampling: for choices and metrics."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from clients.protocol import Plan
from data.sources import GROUP, Records
from model import Batch
from privacy.bookkeeping import Units
from privacy.unit_index import UnitIndex

_AT_ONCE = 512


def whole_pass(plan: Plan, records: Records) -> Iterator[tuple[Tensor, Batch, Units]]:
    """Yield physical batches: the numbers of their examples, the examples, and which units these belong to.

    At level strict each unit comes alone; records without groups' numbers, which no model sees.
    """
    count = len(next(iter(records.values())))
    index = UnitIndex(count, records[GROUP] if plan.privacy.unit == "group" else None, plan.privacy.records_per_unit)
    inputs = {name: tensor for name, tensor in records.items() if name != GROUP}
    at_once = 1 if plan.privacy.numeric == "strict" else _AT_ONCE
    for part, unit_B in index.parts(torch.arange(index.count), at_once):
        units = Units.one_each(len(part)) if unit_B is None else Units(len(part), int(unit_B[-1]) + 1, unit_B)
        yield part, {name: tensor[part] for name, tensor in inputs.items()}, units
