"""The clipped gradients of a step's units, added up over physical batches of whole units and of parts of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from conclave.model.records import Records
from conclave.privacy.bookkeeping import Units
from conclave.privacy.gradients.modes import Clipping, ExampleLoss, GradientMode
from conclave.privacy.gradients.physical_batch import Room
from conclave.privacy.gradients.unit_draws import numbered
from conclave.privacy.gradients.unit_index import PhysicalBatch, UnitIndex
from conclave.privacy.gradients.units_in_parts import UnitInParts
from conclave.privacy.releases.load_histogram import LoadHistogram
from conclave.privacy.training.containment import add_part, clipped_sums
from conclave.privacy.training.dpsgd_mechanism import DpSgd
from conclave.privacy.training.unit_optimizer import UnitDPOptimizer


@dataclass(frozen=True)
class Accumulation:
    """What one step adds up with, and where to: gradients to the sums of ``optimizer``, choices to those of ``loads``.

    loss: of batches whose examples are numbered, see :mod:`conclave.privacy.gradients.unit_draws`.
    clip: the bound as it stands in this step.
    contain: see :mod:`conclave.privacy.training.containment`.
    """

    mechanism: DpSgd
    clip: float
    mode: GradientMode
    loss: ExampleLoss
    trained: Sequence[Tensor]
    optimizer: UnitDPOptimizer
    loads: LoadHistogram | None
    contain: bool

    def add_up(self, records: Records, index: UnitIndex, chosen: Tensor, room: Room) -> float:
        """Begin the step's sums anew and add the chosen units; return the count for an adaptive clip."""
        self.optimizer.forget_sums()  # of a step that was interrupted
        if self.loads is not None:
            self.loads.begin_step()
        inside, in_parts = 0.0, None
        for physical in index.batches(chosen, room):
            batch = _examples(records, physical)
            if self.loads is not None:
                self.loads.begin_batch(physical.example_B)
            if physical.of_unit is None:
                inside += self._add_units(batch, physical.units.to(next(iter(batch.values())).device))
                if self.loads is not None:
                    self.loads.end_batch(physical.units)
                continue
            in_parts = in_parts or UnitInParts(self.trained, physical.of_unit)
            self._add_part(in_parts, batch)
            if self.loads is not None:
                self.loads.end_part(physical.of_unit if physical.last else None)
            if physical.last:
                inside += self._end_parts(in_parts)
                in_parts = None
        return inside

    @property
    def _clipping(self) -> Clipping:
        return Clipping(self.mechanism.clipping, self.clip)

    def _add_units(self, batch: Records, units: Units) -> float:
        inside = 0.0
        for found in clipped_sums(self.mode, self.loss, batch, units, self._clipping, contain=self.contain):
            self.optimizer.accumulate(self.trained, found.sums)
            inside += found.inside
        return inside

    def _add_part(self, unit: UnitInParts, batch: Records) -> None:
        several_tasks = self.mechanism.gradients == "bookkeeping" and self.mechanism.numeric == "fast"
        add_part(unit, self.mode, self.loss, batch, several_tasks=several_tasks, contain=self.contain)

    def _end_parts(self, unit: UnitInParts) -> float:
        found = unit.clipped(self._clipping, on_grid=self.mechanism.numeric == "strict")
        self.optimizer.accumulate(self.trained, found.sums)
        return found.inside


def _examples(records: Records, physical: PhysicalBatch) -> dict[str, Tensor]:
    """Return the examples of a physical batch, numbered."""
    example_B = physical.example_B
    return numbered({name: tensor[example_B.to(tensor.device)] for name, tensor in records.items()}, example_B)
