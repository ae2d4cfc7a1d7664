"""Random layers draw for every example from a stream of its own: a function of secret, step, layer and example.

A mode of gradients may run a part of a batch alone. So each example brings its number along, as one tensor more.
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext

from torch import Tensor

from conclave.base.errors import BadInputError
from conclave.model.layers.unit_random import drawing_from
from conclave.model.records import Records
from conclave.privacy.gradients.modes import ExampleLoss
from conclave.privacy.randomness import derive, per_unit_uniform
from conclave.privacy.releases.load_histogram import LoadHistogram

_EXAMPLE = "example number"


def numbered(batch: Records, example_B: Tensor) -> dict[str, Tensor]:
    """Return a batch whose examples carry the numbers ``example_B``."""
    return {**batch, _EXAMPLE: example_B}


def with_own_draws(
    example_loss: ExampleLoss, secret: bytes, step_number: int, loads: LoadHistogram | None
) -> ExampleLoss:
    """Return a loss of :func:`numbered` batches, with random layers drawing as in one step.

    Args:
        loads: takes note of the experts that are chosen, where given.
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
