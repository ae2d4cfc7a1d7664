"""Units that cannot be processed: they end the step, or, on a node, contribute nothing to it.

A node has tried the model on made-up records: a later failure depends on records, and must not show.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch

from conclave.model.records import Records
from conclave.privacy.bookkeeping import Units
from conclave.privacy.gradients.modes import ClippedSum, Clipping, ExampleLoss, GradientMode
from conclave.privacy.gradients.units_in_parts import UnitInParts

log = logging.getLogger("conclave.node")

_LEFT_OUT = "a unit could not be processed; it contributes nothing to this step"


def clipped_sums(
    mode: GradientMode, loss: ExampleLoss, batch: Records, units: Units, clipping: Clipping, *, contain: bool
) -> Iterator[ClippedSum]:
    """Yield the clipped sum of whole units; if that fails and is contained, of each unit that does not fail alone."""
    try:
        together = mode.clipped_sum(loss, batch, units, clipping)
    except Exception:
        if not contain:
            raise
    else:
        yield together
        return
    for alone, one in _each_alone(batch, units):
        try:
            found = mode.clipped_sum(loss, alone, one, clipping)
        except Exception:
            log.exception(_LEFT_OUT)
            continue
        yield found


def _each_alone(batch: Records, units: Units) -> Iterator[tuple[Records, Units]]:
    unit_B = torch.arange(units.examples) if units.unit_B is None else units.unit_B.cpu()
    for unit in range(units.count):
        mine_B = unit_B == unit
        size = int(mine_B.sum())
        one = Units.one_each(1) if units.unit_B is None else Units(size, 1, torch.zeros(size, dtype=torch.int64))
        yield {name: tensor[mine_B.to(tensor.device)] for name, tensor in batch.items()}, one


def add_part(
    unit: UnitInParts, mode: GradientMode, loss: ExampleLoss, batch: Records, *, several_tasks: bool, contain: bool
) -> None:
    """Add the gradients of a part of a unit; if that fails and is contained, leave the unit out."""
    try:
        with mode.unwatched():
            unit.add(loss(batch), several_tasks=several_tasks)
    except Exception:
        if not contain:
            raise
        log.exception(_LEFT_OUT)
        unit.leave_out()
