"""Losses and gradients of records as training would take them, by plain autograd: the audit's own truth."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from conclave.base.errors import BadInputError
from conclave.model.layers.unit_random import drawing_from
from conclave.model.records import Records
from conclave.privacy.audit.arithmetic import RoundedOnce
from conclave.privacy.audit.memory import Memory
from conclave.privacy.audit.subject import Subject
from conclave.privacy.gradients.physical_batch import MOST
from conclave.privacy.randomness import derive, per_unit_uniform

Losses = Callable[[Records, Tensor], Tensor]
"""(batch, number of each example) → losses [B] or [B, tasks], each example with the random draws of its number."""


@contextmanager
def kept(subject: Subject) -> Iterator[Memory]:
    """Restore model and loss at the end, whatever they keep and wherever they keep it."""
    memory = Memory(model=subject.module, loss=subject.example_loss)
    try:
        yield memory
    finally:
        memory.restore()


def losses_of(subject: Subject, seeds: Iterable[int] = repeat(0)) -> Losses:
    """Return how training takes losses, in training mode.

    If training refuses the model, draws are as if it had not.

    Args:
        seeds: one a call, for what is drawn from streams that all records share. By default the same, so that a model
            that draws from them does not differ by chance.
    """
    seed = iter(seeds)
    try:
        training = subject.training()
    except BadInputError:
        taken: Losses = _with_own_draws(subject)
    else:
        training.close()  # plain autograd: nothing of the training's own may take part
        taken = training.loss_with_draws

    def losses(batch: Records, example_B: Tensor) -> Tensor:
        subject.module.train()
        same_randomness(next(seed))
        return taken({name: tensor.clone() for name, tensor in batch.items()}, example_B)  # it may change them in place

    return losses


def _with_own_draws(subject: Subject) -> Losses:
    secret = derive(bytes(32), "audit", 0)

    def losses(batch: Records, example_B: Tensor) -> Tensor:
        with drawing_from(lambda examples, values: per_unit_uniform(secret, 0, example_B, values)):
            return subject.example_loss(batch)

    return losses


def same_randomness(seed: int = 0) -> None:
    """Start every generator that a program shares anew."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def has_drawn(seed: int = 0) -> bool:
    """Say whether anything was drawn from these generators since :func:`same_randomness`; unknown for GPUs."""
    with callers_randomness_untouched():
        now = _drawn()
        same_randomness(seed)
        return now != _drawn()


def _drawn() -> tuple[object, ...]:
    _, keys, *places = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), np.asarray(keys).tobytes(), *places


@contextmanager
def callers_randomness_untouched() -> Iterator[None]:
    """Restore the generators that a program shares."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def gradient(subject: Subject, loss: Tensor) -> Tensor:
    """Return the gradient of a scalar over all trained parameters, one float64 vector; the graph is kept."""
    parameters = [p for p in subject.module.parameters() if p.requires_grad]
    if not loss.requires_grad:
        return torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).double().flatten() for p, g in zip(parameters, found, strict=True)]
    )


def coarsest_type(subject: Subject) -> torch.dtype:
    """Return the least precise floating-point type in a forward pass, autocast included."""
    with kept(subject), RoundedOnce() as arithmetic:
        losses_of(subject)(subject.records, torch.arange(subject.examples))
    return arithmetic.coarsest or torch.float32


def most_at_once(subject: Subject) -> int:
    """Return how many examples training processes at once; the most that it ever does if that cannot be determined."""
    if subject.mechanism.physical_batch is not None:
        return min(subject.mechanism.physical_batch, MOST)
    same_randomness()
    try:
        with kept(subject), subject.training() as training:
            room = training.measured_room(subject.records)
    except BadInputError:
        return MOST
    return room.examples if room.memory_bytes else MOST
