"""The steps of DP-SGD on one module: sample, add up, noise, update, in that order and from one secret."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from conclave.model.records import Records
from conclave.privacy.gradients.modes import Bookkeeping, ExampleLoss, GradientMode, mode_for
from conclave.privacy.gradients.physical_batch import TRIED, Footprint, Room, measured
from conclave.privacy.gradients.unit_draws import numbered, poisson_sample, with_own_draws
from conclave.privacy.gradients.unit_index import UnitIndex
from conclave.privacy.randomness import derive, standard_normal
from conclave.privacy.releases.load_histogram import DELTA, LOADS, LoadHistogram
from conclave.privacy.training.accounted import check_accounted, check_unchanged
from conclave.privacy.training.accumulation import Accumulation
from conclave.privacy.training.dpsgd_mechanism import DpSgd
from conclave.privacy.training.unit_optimizer import UnitDPOptimizer

_COUNT_GRID = 2.0**20
_SMALL = 32
"""So many examples are processed at once without a look at what they take."""


class PrivateTraining:
    """DP-SGD on one module, step by step. Use as a context manager: it leaves the module clean.

    What a step changes (parameters, clip bound, released loads) is the output of the mechanism; nothing else that saw
    the records may be used.
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
            room: what is processed at once, if that was worked out before.
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
        """The released histograms, added up over the steps: name → float32 [E]; empty if none are asked for."""
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
        """Count a step, even an interrupted one: nobody knows what it revealed, so its noise is used up."""
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
        return self._drawing_loss(numbered(batch, example_B))

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
        """Return what examples take, measured on :data:`~conclave.privacy.gradients.physical_batch.TRIED` made-up ones.

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
        """Work out from the shapes of records how much is processed at once; their values are not used.

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
        return Accumulation(
            self.mechanism,
            self.clip,
            self._mode,
            self._drawing_loss,
            self._trained,
            self._optimizer,
            self._loads,
            self._contain,
        ).add_up(records, index, chosen, room)

    @property
    def _drawing_loss(self) -> ExampleLoss:
        return with_own_draws(self._loss, self._secret, self.step_number, self._loads)

    def _adapt(self, inside: float) -> None:
        rule, divisor = self.mechanism.adaptive, self.mechanism.divisor
        std = rule.count_noise(self.mechanism.noise_parts[DELTA], divisor)
        noise = std * float(standard_normal(derive(self._secret, "count", self.step_number), 1))
        if self.mechanism.numeric == "strict":  # on a grid that the count lies on, as the sums' noise
            noise = round(noise * _COUNT_GRID) / _COUNT_GRID
        self.clip = rule.next(self.clip, inside + noise, divisor)
        self._optimizer.max_grad_norm = self.clip
