"""How many experts and examples fit into a node's memory: from shapes, so it reveals nothing about the data."""

from __future__ import annotations

import resource
from dataclasses import dataclass

from conclave.model import parameters
from conclave.model.config import ModelConfig
from conclave.model.experts.config import HeldExperts
from conclave.privacy.gradients.physical_batch import MEMORY_BYTES, Room
from conclave.protocol.plan import Plan

_PROGRAM_BYTES = {resource.RLIMIT_DATA: 448 << 20, resource.RLIMIT_AS: 1152 << 20}
"""What interpreter and libraries take of either limit; measured with torch 2.13: 415 and 926 MiB."""

BYTES_A_PARAMETER = 48
"""What one parameter takes at once, at most: the message, the received value, the weight and its gradient (float32, 4
bytes each), the sum of clipped gradients, that of the present physical batch and noise (float64, 8 each), and the two
moments of an optimizer (8). Measured with Adam and experts of 4M parameters: 41.6."""


def experts_that_fit(model: ModelConfig, memory_mb: int) -> int:
    """Return how many experts of each layer a node can train within ``memory_mb`` MiB; 0 if not even one fits.

    ``(memory − activations − 48·shared) / (48·expert)``, rounded down, at most all. The parameters of one expert are
    counted over all layers, router rows included. Activations are the 1 GiB that a physical batch is limited to
    (:func:`room_for`), however many records are drawn or a unit has. A token passes ``top_k`` experts however many are
    held, so they do not grow with that number. Interpreter, libraries and records come on top and are not in
    ``memory_mb``.

    Raises:
        BadInputError: the user's own model cannot be built.
    """
    return experts_within(model, memory_mb * 2**20 - MEMORY_BYTES)


def experts_within(model: ModelConfig, model_bytes: int) -> int:
    """As :func:`experts_that_fit`, within the bytes that the model's parameters may take, 48 each.

    Raises:
        BadInputError: the user's own model cannot be built.
    """
    every = expert = 0
    for name, shape in parameters.shapes(model, dict.fromkeys(range(model.layers), (0,))).items():
        if parameters.owner(name).layer is None:
            every += shape.numel()
        else:
            expert += shape.numel()
    left = model_bytes - BYTES_A_PARAMETER * every
    if not expert:  # of a model of the user's own: what is shared fits, or nothing does
        return model.experts.routed if left >= 0 else 0
    return max(0, min(model.experts.routed, left // (BYTES_A_PARAMETER * expert)))


def room_for(plan: Plan, held: HeldExperts | None = None) -> Room:
    """Return how many examples a node processes at once under a plan: from public shapes and its machine's limits.

    The first call for a kind of plan trains the model on made-up records, see
    :mod:`conclave.privacy.training.rehearsal`.

    Args:
        held: the experts it is for; by default as few as a token needs, or all of a model of the user's own.

    Raises:
        BadInputError: the model cannot be trained as the plan asks, or one example takes more memory than there is.
    """
    from conclave.privacy.training.rehearsal import (  # with all of training: who looks at a policy does without
        rehearse,
        tried_mechanism,
    )

    mechanism = tried_mechanism(plan.privacy, plan.noise_multiplier, plan.load_share)
    footprint, most = rehearse(plan.model, mechanism, held), _batch_bytes()
    footprint.check_fits(most)
    return footprint.room(most)


@dataclass(frozen=True)
class ProcessMemory:
    """How the memory that the operating system lets a process have is divided.

    Fixed: how much records take is not public, so nothing may depend on it. ``program_bytes`` are for interpreter and
    libraries. Of the rest, half is for the records, an eighth for a physical batch, three eighths for the model.
    """

    limit_bytes: int
    program_bytes: int

    @property
    def _left(self) -> int:
        return max(0, self.limit_bytes - self.program_bytes)

    @property
    def before_training(self) -> int:
        """Bytes that program and records may take."""
        return self.limit_bytes - self._left + self._left // 2

    @property
    def batch_bytes(self) -> int:
        """Bytes that a physical batch may take."""
        return self._left // 8

    @property
    def model_bytes(self) -> int:
        """Bytes that the model's parameters and all that is made of them may take."""
        return self._left * 3 // 8


def process_memory() -> ProcessMemory | None:
    """Return what the operating system lets this process have (``limits.memory_mb``); None for no limit."""
    found = []
    for kind, program_bytes in _PROGRAM_BYTES.items():
        most, _ = resource.getrlimit(kind)
        if most != resource.RLIM_INFINITY:
            found.append(ProcessMemory(most, program_bytes))
    return min(found, key=lambda memory: memory.batch_bytes, default=None)


def _batch_bytes() -> int:
    process = process_memory()
    return MEMORY_BYTES if process is None else min(MEMORY_BYTES, process.batch_bytes)
