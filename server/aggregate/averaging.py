"""The average of the global model over rounds: it is evaluated and published, but nodes never continue from it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from conclave.base.errors import BadInputError
from conclave.server.aggregate.config import AverageConfig, MovingAverage, TailAverage


class ModelAverage:
    """A weighted mean of the whole models after the rounds so far.

    An expert that nobody returned in a round counts there with the value that it kept.

    Guarantee: a function of models that were published to nodes already, so post-processing; it costs no privacy.

    count: rounds that are in it.
    """

    def __init__(self, config: AverageConfig, rounds: int) -> None:
        """Expect a run of ``rounds`` rounds."""
        self._config = config
        # Rounded first: 0.28 of 25 rounds is 7 of them, in floating point a little more.
        last = math.ceil(round(config.share * rounds, 6)) if isinstance(config, TailAverage) else rounds
        self._first = rounds + 1 - max(1, last)
        self.count = 0
        self.tensors: dict[str, Tensor] = {}

    def add(self, round_number: int, tensors: Mapping[str, Tensor]) -> None:
        """Take in the model after a round. Rounds must come in order; one that changed nothing is not to be added.

        Args:
            tensors: wire name → float32, the same names and shapes every time; copied.
        """
        if self._config.kind == "none" or round_number < self._first:
            return
        if not self.count:
            self.tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        else:
            weight = self._weight(self.count + 1)
            for name, tensor in tensors.items():
                self.tensors[name].lerp_(tensor, weight)
        self.count += 1

    def _weight(self, count: int) -> float:
        """What the newest of ``count`` models weighs."""
        if isinstance(self._config, MovingAverage):
            return (1.0 - self._config.decay) / (1.0 - self._config.decay**count)
        return 1.0 / count

    def of(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the average, or ``tensors``, the model itself, while nothing is averaged."""
        return self.tensors if self.count else tensors

    def restore(self, count: int, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
        """Restore what a checkpoint kept of ``count`` and ``tensors``, for the model ``like``.

        Raises:
            BadInputError: they are of another model, or of a run that averages differently.
        """
        fits = {n: t.shape for n, t in tensors.items()} == ({n: t.shape for n, t in like.items()} if count else {})
        if count < 0 or not fits or (count and self._config.kind == "none"):
            raise BadInputError("the checkpoint holds another average than that of the scenario's model")
        self.count, self.tensors = count, {name: tensor.clone() for name, tensor in tensors.items()}
