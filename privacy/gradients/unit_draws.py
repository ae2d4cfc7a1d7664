"""What is drawn for a unit is a function of secret, step and that unit: whether it is sampled, and what layers draw.

A gradient mode may run a part of a batch alone. So each example carries its number, in one additional tensor.
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from conclave.base.errors import BadInputError
from conclave.model.layers.unit_random import drawing_from
from conclave.model.records import Records
from conclave.privacy.gradients.modes import ExampleLoss
from conclave.privacy.randomness import derive, per_unit_uniform, uniform_words
from conclave.privacy.releases.load_histogram import LoadHistogram

_EXAMPLE = "example number"


def poisson_sample(units: int, rate: float, secret: bytes, step: int) -> Tensor:
    """Return the indices of the sampled units, ascending, int64; possibly none.

    Each unit enters independently with probability ``rate`` (rounded down to a multiple of 2^-53). Unit i's
    draw is a function of (secret, step, i), so adding or removing another unit changes nothing for i.

    Privacy: ``rate`` is public; the size of the sample is not, and must not leave the node.
    """
    if rate >= 1.0:
        return torch.arange(units)
    words = uniform_words(derive(secret, "sampling", step), units)
    chosen = (words >> np.uint64(11)) < np.uint64(int(rate * 2.0**53))
    return torch.from_numpy(np.flatnonzero(chosen))


def numbered(batch: Records, example_B: Tensor) -> dict[str, Tensor]:
    """Return a batch whose examples carry the numbers ``example_B``."""
    return {**batch, _EXAMPLE: example_B}


def with_own_draws(
    example_loss: ExampleLoss, secret: bytes, step_number: int, loads: LoadHistogram | None
) -> ExampleLoss:
    """Return a loss of :func:`numbered` batches, with random layers drawing as in one step.

    Args:
        loads: if given, notes the experts that are chosen.
    """

    def loss(batch: Records) -> Tensor:
        example_B = batch[_EXAMPLE]
        layers = itertools.count()

        def draw(examples: int, values: int) -> Tensor:
            if examples != len(example_B):
                raise BadInputError(f"a random layer saw {examples} rows of {len(example_B)} examples")
            return per_unit_uniform(derive(secret, "draws", next(layers)), step_number, example_B, values)

        batch = {name: tensor for name, tensor in batch.items() if name != _EXAMPLE}
        watching = nullcontext() if loads is None else loads.watching(example_B, batch)
        with drawing_from(draw), watching:
            return example_loss(batch)

    return loss
