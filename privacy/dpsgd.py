"""DP-SGD: clipped per-unit gradients, summed, noised, divided by a declared size.

Built on Opacus's ``DPOptimizer`` and its samplers; what differs, and why:

* The divisor is ``sampling_rate · declared_size``, both public. Opacus derives it from ``len(dataset)``.
* A unit whose gradient is not finite, or above 2^60, contributes exact zeros by selection. Multiplying by a
  zero factor keeps NaN, and the update then shows whether that unit was present.
* Units are clipped by upper bounds of their norms, shrunk by 2^-10, so rounding cannot carry a contribution over the
  bound; sums of several physical batches accumulate in fp64.
* Noise comes from the node's secret and is added to every trained parameter, also experts no token reached.
* An empty Poisson batch is a step of pure noise.

Guarantee: with noise multiplier σ and rate q, one step is the Poisson-subsampled Gaussian mechanism with sensitivity 1
in units of ``clip`` under add/remove of one unit (Abadi et al. 2016, arXiv:1607.00133). At numeric level ``fast`` this
assumes that weights do not amplify rounding across units; at ``strict`` it does not (see docs/privacy.md).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from model.errors import BadInputError
from model.unit_random import drawing_from
from privacy import allowed
from privacy.accounted import check_accounted, check_unchanged
from privacy.bookkeeping import Units
from privacy.clipping import LARGEST_NORM, SMALLEST_CLIP, AdaptiveClip, Kind
from privacy.config import PrivacyConfig
from privacy.gradient_modes import (
    GRID_BITS,
    Bookkeeping,
    Clipping,
    ExampleLoss,
    GradientMode,
    Records,
    mode_for,
    unit_mean,
)
from privacy.load_histogram import DELTA, LOADS, LoadHistogram, noise_parts
from privacy.local_optimizers import NoiseCorrectedAdam, OptimizerConfig, SgdConfig, make_optimizer
from privacy.mechanisms import LARGEST_NOISE, MOST_STEPS
from privacy.noise_ahead import NoiseAhead, SharedWork, worth_a_thread
from privacy.physical_batch import MEMORY_BYTES, MOST, TRIED, Footprint, Room, measured
from privacy.randomness import derive, per_unit_uniform, standard_normal
from privacy.sampling import poisson_sample
from privacy.unit_index import PhysicalBatch, UnitIndex
from privacy.units_in_parts import UnitInParts

log = logging.getLogger("conclave.node")

Gradients = Literal["bookkeeping", "hooks", "ghost"]
Numeric = Literal["fast", "strict"]

_EXAMPLE = "example number"
_COUNT_GRID = 2.0**20
_CHUNK = 1 << 16  # values that stay in the cache while noise is added to them
_SMALL = 32
"""So many examples are processed at once without a look at what they take."""


@dataclass(frozen=True, kw_only=True)
class DpSgd:
    """The mechanism of one charge. Every field is public.

    noise_multiplier: σ of everything released from one sample together; the noise added to a clipped sum has standard
        deviation σ·clip where nothing else is. None means no privacy: neither clipping nor noise (simulation only).
    load_share: share of σ⁻² that a histogram of expert loads gets; with 0 there is none.
    declared_size: the public number of units; with ``sampling_rate`` it fixes the divisor.
    records_per_unit: cap on a group's records, where groups are the unit.
    physical_batch: examples processed at once; None takes what fits into ``memory_bytes``. It changes the result by
        rounding only. A group with more records is processed in parts, whose gradients are added up before the clip.
    """

    steps: int
    learning_rate: float
    sampling_rate: float
    clip: float
    noise_multiplier: float | None
    declared_size: int
    gradients: Gradients = "bookkeeping"
    numeric: Numeric = "fast"
    clipping: Kind = "flat"
    adaptive: AdaptiveClip = field(default_factory=AdaptiveClip)
    records_per_unit: int | None = None
    optimizer: OptimizerConfig = field(default_factory=SgdConfig)
    physical_batch: int | None = None
    memory_bytes: int = MEMORY_BYTES
    load_share: float = 0.0

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            BadInputError: a word that is none of the allowed, a number out of range, or another type.
        """
        allowed.check_word("gradients", self.gradients, get_args(Gradients))
        allowed.check_word("numeric", self.numeric, get_args(Numeric))
        allowed.check_word("clipping", self.clipping, get_args(Kind))
        allowed.check_whole("steps", self.steps, 1, MOST_STEPS)
        allowed.check_number("learning_rate", self.learning_rate, 0.0, allowed.FINITE)
        allowed.check_number("sampling_rate", self.sampling_rate, 0.0, 1.0, above=True)
        allowed.check_number("clip", self.clip, SMALLEST_CLIP, LARGEST_NORM)
        if self.noise_multiplier is not None:
            allowed.check_number("noise_multiplier", self.noise_multiplier, 0.0, LARGEST_NOISE, above=True)
        allowed.check_whole("declared_size", self.declared_size, 1, allowed.MOST_UNITS)
        allowed.check_whole("records_per_unit", self.records_per_unit, 1, allowed.MOST_UNITS, may_be_none=True)
        allowed.check_whole("physical_batch", self.physical_batch, 1, allowed.MOST_UNITS, may_be_none=True)
        allowed.check_whole("memory_bytes", self.memory_bytes, 1, allowed.MOST_BYTES)
        allowed.check_number("load_share", self.load_share, 0.0, 1.0)
        if not isinstance(self.adaptive, AdaptiveClip):
            raise BadInputError(f"adaptive is {self.adaptive!r}, must be a privacy.clipping.AdaptiveClip")

    @classmethod
    def of(
        cls,
        config: PrivacyConfig,
        *,
        steps: int,
        learning_rate: float,
        optimizer: OptimizerConfig,
        noise_multiplier: float | None,
        declared_size: int,
        load_share: float = 0.0,
    ) -> DpSgd:
        """Return the mechanism that a configuration asks for."""
        return cls(
            steps=steps,
            learning_rate=learning_rate,
            optimizer=optimizer,
            noise_multiplier=noise_multiplier,
            declared_size=declared_size,
            load_share=load_share,
            sampling_rate=config.sampling_rate,
            clip=config.clip,
            clipping=config.clipping,
            gradients=config.gradients,
            numeric=config.numeric,
            records_per_unit=config.records_per_unit,
        )

    @property
    def divisor(self) -> float:
        """Expected units in a batch, the public divisor of the sum."""
        return self.sampling_rate * self.declared_size

    @property
    def noise_parts(self) -> dict[str, float]:
        """σ of each release of a step, by name, relative to its own sensitivity: together they have the charged one."""
        if self.noise_multiplier is None:
            raise ValueError("there is no noise without privacy")
        return noise_parts(self.noise_multiplier, self.load_share)

    @property
    def gradient_noise_multiplier(self) -> float:
        """σ of the gradient alone: more than its part where an adaptive clip counts units beside it."""
        part = self.noise_parts[DELTA]
        if self.clipping == "adaptive":
            return self.adaptive.gradient_noise_multiplier(part, self.divisor)
        return part


class UnitDPOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus is untyped
    """Opacus's optimizer with sums of our own, a declared divisor and the node's own noise.

    Call :meth:`accumulate` for each physical batch, any number of times including zero, then :meth:`noisy_step` once.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, mechanism: DpSgd) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=mechanism.gradient_noise_multiplier,
            max_grad_norm=mechanism.clip,
            expected_batch_size=mechanism.divisor,
            loss_reduction="sum",
        )
        self.noise_secret: bytes | None = None
        self._ahead: tuple[bytes, NoiseAhead] | None = None
        self._most_ahead = mechanism.memory_bytes // 4
        self._on_grid = mechanism.numeric == "strict"
        self._sums: list[Tensor | None] = [None] * len(self.params)

    def accumulate(self, parameters: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
        """Add a physical batch; the first is kept as it is, from the second on sums are float64 (or integers)."""
        place = {id(parameter): number for number, parameter in enumerate(self.params)}
        for parameter, total in zip(parameters, sums, strict=True):
            number = place[id(parameter)]
            before = self._sums[number]
            if before is None:
                self._sums[number] = total
            else:
                self._sums[number] = before + total if self._on_grid else before.double() + total.double()

    def take_sums(self) -> list[Tensor]:
        """Return the accumulated sums, float64, before any noise, and start anew: for audits. Never release them."""
        unit = self.max_grad_norm * 2.0**-GRID_BITS if self._on_grid else 1.0
        sums = [
            torch.zeros_like(p, dtype=torch.float64) if total is None else total.double() * unit
            for p, total in zip(self.params, self._sums, strict=True)
        ]
        self.forget_sums()
        return sums

    def forget_sums(self) -> None:
        """Start anew."""
        self._sums = [None] * len(self.params)

    def add_noise(self) -> None:
        """Set ``p.grad`` to the sum plus noise, for every parameter, whether or not a unit reached it."""
        if self.noise_secret is None:
            raise RuntimeError("a step needs a noise secret of its own")
        secret, ahead = self._ahead or (None, None)
        shared: list[Callable[[], None]] = []
        for number, (parameter, total) in enumerate(zip(self.params, self._sums, strict=True)):
            drawn = ahead is not None and secret == self.noise_secret and number < len(ahead)
            if ahead is not None and drawn:
                noise = ahead.take(number)
            else:
                noise = standard_normal(derive(self.noise_secret, number), parameter.numel())
                self._scale(noise.numpy())
            parameter.grad = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            calls = self._to_gradient(parameter.grad.view(-1), noise.to(parameter.device), total)
            if drawn and parameter.device.type == "cpu":
                shared += calls
            else:
                for call in calls:
                    call()
        if shared:
            SharedWork(shared).finish()
        self.forget_sums()
        self.noise_secret = None  # noise is used once

    @property
    def _unit(self) -> float:
        return self.max_grad_norm * 2.0**-GRID_BITS if self._on_grid else 1.0

    def _scale(self, noise_N: NDArray[np.float64]) -> None:
        noise_N *= self.noise_multiplier * self.max_grad_norm / self._unit
        if self._on_grid:  # rounded to whole steps of the sum's grid: sum and noise together are then exact integers
            np.rint(noise_N, out=noise_N)

    def _to_gradient(self, gradient_N: Tensor, noise_N: Tensor, total: Tensor | None) -> Iterator[Callable[[], None]]:
        """Yield calls that each set some of the gradient to noise plus sum, over the divisor."""
        total_N = None if total is None else total.reshape(-1)
        size = _CHUNK if gradient_N.device.type == "cpu" else max(1, len(noise_N))
        for start in range(0, len(noise_N), size):
            part = slice(start, start + size)
            summed = None if total_N is None else total_N[part]
            yield partial(_set, gradient_N[part], noise_N[part], summed, self._unit / self.expected_batch_size)

    @contextmanager
    def drawing_ahead(self, noise_secret: bytes) -> Iterator[None]:
        """Draw the noise of the step that this is around while its gradient is computed, if a core is free for that."""
        wanted = [(derive(noise_secret, number), p.numel()) for number, p in enumerate(self.params)]
        if not worth_a_thread(sum(count for _, count in wanted)):
            yield
            return
        with NoiseAhead(wanted, self._most_ahead, self._scale) as ahead:
            self._ahead = noise_secret, ahead
            try:
                yield
            finally:
                self._ahead = None

    def noisy_step(self, noise_secret: bytes) -> None:
        """Noise the accumulated sums with a secret used for this step only, and take the step."""
        self.noise_secret = noise_secret
        self.add_noise()
        if isinstance(self.original_optimizer, NoiseCorrectedAdam):
            std = self.noise_multiplier * self.max_grad_norm / self.expected_batch_size
            for group in self.original_optimizer.param_groups:
                group["noise_variance"] = std**2
        self.original_optimizer.step()
        self.original_optimizer.zero_grad()


def _set(gradient_N: Tensor, noise_N: Tensor, total_N: Tensor | None, factor: float) -> None:
    """Set to ``(noise + total) · factor`` in float64, rounded once to what the gradient holds."""
    noisy = noise_N if total_N is None else total_N.to(torch.float64, copy=True).add_(noise_N)
    gradient_N.copy_(noisy.mul_(factor))


class PrivateTraining:
    """DP-SGD on one module, step by step. Use as a context manager: it leaves the module clean.

    What a step changes, parameters, clip bound and released loads, is the output of the mechanism; nothing else may be
    used that saw the records.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        example_loss: ExampleLoss,
        mechanism: DpSgd,
        secret: bytes,
        *,
        room: Room | None = None,
        contain: bool = False,
    ) -> None:
        """Attach to a module whose trained parameters ``optimizer`` holds.

        Args:
            room: what is processed at once, where that was worked out before.
            contain: a unit that cannot be processed contributes nothing, and the step goes on. For a node, which has
                tried the model on made-up records: what fails after that depends on records, and must not show.

        Raises:
            BadInputError: the module holds a layer that cannot be made private, or has no expert loads to release.
        """
        self.mechanism, self.clip, self.step_number = mechanism, mechanism.clip, 0
        self._module, self._loss, self._secret = module, example_loss, secret
        self._optimizer = UnitDPOptimizer(optimizer, mechanism)
        self._trained = [p for p in module.parameters() if p.requires_grad]
        self._contain = contain
        self._room = room
        if mechanism.physical_batch is not None:
            self._room = Room(mechanism.physical_batch)
        self._mode = self._attached()
        self._loads = LoadHistogram(module, mechanism.noise_parts[LOADS]) if mechanism.load_share else None
        self._accounted = room is not None  # working it out checked it, on made-up records

    def _attached(self) -> GradientMode:
        return mode_for("strict" if self.mechanism.numeric == "strict" else self.mechanism.gradients, self._module)

    def __enter__(self) -> PrivateTraining:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def fallbacks(self) -> list[str]:
        """Layers without a rule of their own, which are materialised unit by unit: right, but slow."""
        return self._mode.fallbacks if isinstance(self._mode, Bookkeeping) else []

    def close(self) -> None:
        """Leave the module as it was."""
        self._mode.close()
        if self._loads is not None:
            self._loads.close()

    @property
    def loads(self) -> dict[str, Tensor]:
        """The released histograms, added up over the steps: name → float32 [E]; empty where none is asked for."""
        return {} if self._loads is None else self._loads.released()

    def step(self, records: Records, index: UnitIndex | None = None) -> None:
        """Sample units, clip, add up, add noise, and let the optimizer take the step.

        Args:
            records: named tensors; the first axis is the example.
            index: which examples belong to which unit; by default each is its own.
        """
        index = index or UnitIndex(len(next(iter(records.values()))))
        noise_secret = derive(self._secret, "noise", self.step_number)
        with self._one_step(), self._optimizer.drawing_ahead(noise_secret):
            chosen = self.sample(index.count)
            self._module.train()
            inside = self.accumulate(records, index, chosen)
            self._optimizer.noisy_step(noise_secret)
            if self._loads is not None:
                self._loads.add_noise(derive(self._secret, "loads", self.step_number))
            if self.mechanism.clipping == "adaptive":
                self._adapt(inside)

    @contextmanager
    def _one_step(self) -> Iterator[None]:
        """Count a step, also one that was interrupted: nobody can tell what it showed, so its noise is used up."""
        try:
            yield
        finally:
            self.step_number += 1

    def sample(self, units: int) -> Tensor:
        """Return the units of this step, int64, ascending: each enters independently with the public rate."""
        return poisson_sample(units, self.mechanism.sampling_rate, self._secret, self.step_number)

    def sums_without_noise(self, records: Records, index: UnitIndex, chosen: Tensor) -> list[Tensor]:
        """Return the clipped sum of given units, one float64 tensor per parameter: for audits. Never release it."""
        self._module.train()
        self.accumulate(records, index, chosen)
        return self._optimizer.take_sums()

    def loads_without_noise(self, records: Records, index: UnitIndex, chosen: Tensor) -> Tensor:
        """Return the load histogram of given units, float64, all layers in one: for audits. Never release it.

        Raises:
            ValueError: none is asked for.
        """
        if self._loads is None:
            raise ValueError("the mechanism releases no loads")
        self._module.train()
        self.accumulate(records, index, chosen)
        self._optimizer.take_sums()
        return self._loads.take_sums()

    def noised_gradients(self, records: Records, index: UnitIndex) -> list[Tensor]:
        """Return what the optimizer would see, one tensor per parameter, in place of a step: it counts as one."""
        with self._one_step():
            self._module.train()
            self.accumulate(records, index, self.sample(index.count))
            self._optimizer.noise_secret = derive(self._secret, "noise", self.step_number)
            self._optimizer.add_noise()
        gradients = [p.grad for p in self._trained if p.grad is not None]
        self._optimizer.original_optimizer.zero_grad()
        return gradients

    def loss_with_draws(self, batch: Records, example_B: Tensor) -> Tensor:
        """Return the loss of each example, numbered ``example_B``, with random layers drawing as in this step."""
        return self._loss_with_draws({**batch, _EXAMPLE: example_B})

    def accumulate(self, records: Records, index: UnitIndex, chosen: Tensor) -> float:
        """Add the clipped gradients of the chosen units to the step's sums; return the count for an adaptive clip.

        Raises:
            BadInputError: other parameters are trained than at first; before the first step, a gradient is not
                accounted for.
        """
        self._check_accounted(records)
        if self._room is None and (index.grouped or len(chosen) > _SMALL):
            self._room = self.measured_room(records)
        return self._add_up(records, index, chosen, self._room or Room(_SMALL))

    def footprint(self, made_up: Records) -> Footprint:
        """Return what examples take, measured on :data:`~privacy.physical_batch.TRIED` made-up ones.

        Raises:
            BadInputError: the module cannot be trained on them.
        """
        self._module.train()
        self._check_accounted(made_up)
        strict = self.mechanism.numeric == "strict"
        # At level strict units come one by one; what a part of one takes is what counts.
        index = UnitIndex(TRIED, torch.zeros(TRIED, dtype=torch.int64), TRIED) if strict else UnitIndex(TRIED)
        try:
            return measured(
                lambda: self._add_up(made_up, index, torch.arange(index.count), Room(TRIED)),
                self._module,
                grams=not strict and self.mechanism.gradients == "bookkeeping",
            )
        finally:
            self._optimizer.forget_sums()

    def _check_accounted(self, records: Records) -> None:
        check_unchanged(self._module, self._trained)
        if not self._accounted:
            check_accounted(self._mode, self._module, self._loss, records, among_owners=not self._contain)
            self._accounted = True

    def measured_room(self, records: Records) -> Room:
        """Work out from the shapes of records what is processed at once; their values are not looked at.

        Its footprint is unknown where the loss cannot be computed on zeros.
        """
        made_up = {name: tensor.new_zeros(TRIED, *tensor.shape[1:]) for name, tensor in records.items()}
        self._mode.close()
        self._mode = self._attached()  # for the trial alone: what a mode remembers must come from records
        try:
            return self.footprint(made_up).room(self.mechanism.memory_bytes)
        except Exception:  # what the caller's loss makes of zeros is no error of the records'
            return Room(_SMALL)
        finally:
            self._mode.close()
            self._mode = self._attached()

    def _add_up(self, records: Records, index: UnitIndex, chosen: Tensor, room: Room) -> float:
        self._optimizer.forget_sums()  # of a step that was interrupted
        if self._loads is not None:
            self._loads.begin_step()
        inside, in_parts = 0.0, None
        for physical in index.batches(chosen, room):
            batch = _examples(records, physical)
            if self._loads is not None:
                self._loads.begin_batch(physical.example_B)
            if physical.of_unit is None:
                inside += self._add_units(batch, physical.units.to(next(iter(batch.values())).device))
                if self._loads is not None:
                    self._loads.end_batch(physical.units)
                continue
            in_parts = in_parts or UnitInParts(self._trained, physical.of_unit)
            self._add_part(in_parts, batch)
            if self._loads is not None:
                self._loads.end_part(physical.of_unit if physical.last else None)
            if physical.last:
                found = in_parts.clipped(self._clipping, on_grid=self.mechanism.numeric == "strict")
                self._optimizer.accumulate(self._trained, found.sums)
                inside += found.inside
                in_parts = None
        return inside

    @property
    def _clipping(self) -> Clipping:
        return Clipping(self.mechanism.clipping, self.clip)

    def _add_units(self, batch: Records, units: Units) -> float:
        """Add the clipped gradients of whole units; return the count for an adaptive clip."""
        try:
            found = self._mode.clipped_sum(self._loss_with_draws, batch, units, self._clipping)
        except Exception:
            if not self._contain:
                raise
            return self._add_one_by_one(batch, units)
        self._optimizer.accumulate(self._trained, found.sums)
        return found.inside

    def _add_one_by_one(self, batch: Records, units: Units) -> float:
        """As :meth:`_add_units`, where that failed: a unit that fails alone, too, contributes nothing."""
        unit_B = torch.arange(units.examples) if units.unit_B is None else units.unit_B.cpu()
        inside = 0.0
        for unit in range(units.count):
            mine_B = unit_B == unit
            alone = {name: tensor[mine_B.to(tensor.device)] for name, tensor in batch.items()}
            size = int(mine_B.sum())
            one = Units.one_each(1) if units.unit_B is None else Units(size, 1, torch.zeros(size, dtype=torch.int64))
            try:
                found = self._mode.clipped_sum(self._loss_with_draws, alone, one, self._clipping)
            except Exception:
                log.exception("a unit could not be processed; it contributes nothing to this step")
                continue
            self._optimizer.accumulate(self._trained, found.sums)
            inside += found.inside
        return inside

    def _add_part(self, unit: UnitInParts, batch: Records) -> None:
        """Add the gradients of a part of a unit."""
        bookkeeping = self.mechanism.gradients == "bookkeeping" and self.mechanism.numeric == "fast"
        try:
            with self._mode.unwatched():
                unit.add(self._loss_with_draws(batch), several_tasks=bookkeeping)
        except Exception:
            if not self._contain:
                raise
            log.exception("a unit could not be processed; it contributes nothing to this step")
            unit.leave_out()

    def _adapt(self, inside: float) -> None:
        rule, divisor = self.mechanism.adaptive, self.mechanism.divisor
        std = rule.count_noise(self.mechanism.noise_parts[DELTA], divisor)
        noise = std * float(standard_normal(derive(self._secret, "count", self.step_number), 1))
        if self.mechanism.numeric == "strict":  # on a grid that the count lies on, as the sums' noise
            noise = round(noise * _COUNT_GRID) / _COUNT_GRID
        self.clip = rule.next(self.clip, inside + noise, divisor)
        self._optimizer.max_grad_norm = self.clip

    def _loss_with_draws(self, batch: Records) -> Tensor:
        """Give every example a stream of its own: a function of secret, step, layer and example.

        A mode may run a part of a batch alone: each example brings its number along.
        """
        example_B = batch[_EXAMPLE]
        layers = itertools.count()

        def draw(examples: int, values: int) -> Tensor:
            if examples != len(example_B):
                raise BadInputError(f"a random layer saw {examples} rows of {len(example_B)} examples")
            return per_unit_uniform(derive(self._secret, "draws", next(layers)), self.step_number, example_B, values)

        batch = {name: tensor for name, tensor in batch.items() if name != _EXAMPLE}
        watching = nullcontext() if self._loads is None else self._loads.watching(example_B, batch)
        with drawing_from(draw), watching:
            return self._loss(batch)


def _examples(records: Records, physical: PhysicalBatch) -> dict[str, Tensor]:
    """Return the examples of a physical batch. A mode may run a part of it alone: each brings its number along."""
    example_B = physical.example_B
    batch = {name: tensor[example_B.to(tensor.device)] for name, tensor in records.items()}
    return batch | {_EXAMPLE: example_B}


class Outcome(NamedTuple):
    """What training left beside the parameters: the clip bound, and the released loads by name."""

    clip: float
    loads: Mapping[str, Tensor]


def train_privately(
    module: nn.Module,
    example_loss: ExampleLoss,
    records: Records,
    mechanism: DpSgd,
    secret: bytes,
    *,
    group_B: Tensor | None = None,
    scales: dict[str, float] | None = None,
    room: Room | None = None,
    contain: bool = False,
) -> Outcome:
    """Run ``mechanism.steps`` steps of DP-SGD on ``module`` in place.

    Args:
        module: its parameters are all trained. The forward pass must keep units independent and state unchanged.
        example_loss: called with a batch of examples taken from ``records``.
        records: named tensors; the first axis is the example.
        mechanism: the public parameters that the ledger was charged for.
        secret: 256 bits that nobody else knows; the same secret replays the same mechanism.
        group_B: int64, the group of each record, where groups are the unit; None where each record is one.
        scales: parameter name → factor on the learning rate; public.
        room, contain: see :class:`PrivateTraining`.

    Guarantee: the parameters, the clip bound afterwards and the loads are together a release of ``steps`` composed
    Poisson-subsampled Gaussian mechanisms with the given rate and σ; nothing else leaves this function.

    Raises:
        BadInputError: the module holds a layer that cannot be made private, or has no expert loads to release.
    """
    optimizer = make_optimizer(module, mechanism.optimizer, mechanism.learning_rate, scales)
    index = UnitIndex(len(next(iter(records.values()))), group_B, mechanism.records_per_unit)
    if mechanism.noise_multiplier is None:
        most = room or Room(mechanism.physical_batch or MOST)
        _train_without_privacy(module, optimizer, example_loss, records, index, mechanism, secret, most)
        return Outcome(mechanism.clip, {})
    with PrivateTraining(module, optimizer, example_loss, mechanism, secret, room=room, contain=contain) as training:
        for _ in range(mechanism.steps):
            training.step(records, index)
        return Outcome(training.clip, training.loads)


def _train_without_privacy(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    example_loss: ExampleLoss,
    records: Records,
    index: UnitIndex,
    mechanism: DpSgd,
    secret: bytes,
    room: Room,
) -> None:
    module.train()
    for step in range(mechanism.steps):
        chosen = poisson_sample(index.count, mechanism.sampling_rate, secret, step)
        optimizer.zero_grad()
        for physical in index.batches(chosen, room):
            batch = {name: tensor[physical.example_B.to(tensor.device)] for name, tensor in records.items()}
            loss_B = example_loss(batch)
            mean = unit_mean(loss_B, physical.units.to(loss_B.device)).sum()
            if physical.of_unit is not None:
                mean = loss_B.sum() / physical.of_unit
            (mean / mechanism.divisor).backward()
        optimizer.step()
