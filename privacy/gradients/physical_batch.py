"""How many examples are processed at once: from public shapes alone, so it reveals nothing about the data.

What a batch takes is measured on made-up examples and extrapolated, for the largest batch that sampling may
draw as for the smallest. Where the records' own values decide how much memory a step takes (which experts a token
chooses, how many records a unit has), the worst that they can do is counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from conclave.base.errors import BadInputError
from conclave.model.experts.moe import MoELayer
from conclave.model.experts.stacked import GroupedLinear
from conclave.privacy.gradients.memory_meter import MemoryMeter

MOST = 512
MEMORY_BYTES = 1 << 30
"""What a batch is cut to where nobody says otherwise."""

TRIED = 7
"""Examples on which a batch is measured: a prime, which tells their tensors from those of parameters."""

_UNSEEN = 1.25
"""What operations take within themselves, buckets that are padded, and the allocator's own."""
_GRAM_BYTES = 12
"""Two matrices of float32 for every pair of rows that one expert sees of a unit, padded to a bucket."""
_TIED_BYTES = 24
"""Of a table that looks up and scores: six such matrices."""
_PADDED = 1.5
"""A batch of groups of different sizes may be so much larger than its examples, where units are padded to one size."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of a batch in addition to what the model itself takes, an upper bound.

    example: each example. pair: for each pair of examples of one unit, an example with itself included.
    unit: for each unit of several examples.
    """

    example: int
    pair: int = 0
    unit: int = 0

    def of(self, units: int, largest: int) -> int:
        """Return the bytes of a batch of so many units, the largest of which has ``largest`` examples."""
        several = self.unit if largest > 1 else 0
        return units * (largest * self.example + largest * largest * self.pair + several)

    @property
    def smallest(self) -> int:
        """Bytes of a batch of one example: with less than that nothing can be processed."""
        return self.of(1, 1)

    def check_fits(self, memory_bytes: int) -> None:
        """Refuse a model if not even one example fits into the bytes that a batch may take.

        Raises:
            BadInputError: it takes more.
        """
        if self.smallest > memory_bytes:
            raise BadInputError(
                f"one example of this model takes {self.smallest / 2**20:.1f} MiB in training, "
                f"must be at most the {memory_bytes / 2**20:.1f} that a batch may take"
            )

    def room(self, memory_bytes: int) -> Room:
        """Return what is processed at once if a batch may take that much; at least one example."""
        return Room(max(1, min(MOST, memory_bytes // max(self.smallest, 1))), self, memory_bytes)


@dataclass(frozen=True)
class Room:
    """What is processed at once. Public.

    examples: at most so many, and not more than fits into ``memory_bytes`` by ``footprint``, where that is known.
    """

    examples: int
    footprint: Footprint = Footprint(0)
    memory_bytes: int = 0

    def holds(self, units: int, largest: int) -> bool:
        """Whether so many units, the largest with ``largest`` examples, can be processed together."""
        return (
            units * largest <= _PADDED * self.examples and self.footprint.of(units, largest) <= self.memory_bytes
        ) or units * largest == 1

    @property
    def largest_unit(self) -> int:
        """The most examples of a unit that is processed as a whole; a larger one is in parts."""
        size = self.examples
        while size > 1 and not self.holds(1, size):
            size -= 1
        return size


def measured(run: Callable[[], object], module: nn.Module, *, grams: bool) -> Footprint:
    """Return what examples take, measured while ``run`` processes :data:`TRIED` of them, each a unit of its own.

    Args:
        grams: whether norms are computed from Gram matrices, which grow with the square of a unit's rows.
    """
    # What has as many values as a parameter is a sum or a weight, and counted with the model.
    sizes = {p.numel() for p in module.parameters()}
    meter = MemoryMeter(lambda values: values % TRIED == 0 or values not in sizes)
    rows = _Rows(module)
    try:
        with meter:
            run()
    finally:
        rows.close()
    example = math.ceil(_UNSEEN * meter.peak / TRIED)
    if not grams:
        return Footprint(example)
    experts = {id(p) for layer in module.modules() if isinstance(layer, GroupedLinear) for p in layer.parameters()}
    whole = sum(p.numel() * 4 for p in module.parameters() if p.requires_grad and id(p) not in experts)
    return Footprint(example, rows.pair_bytes, whole)


class _Rows:
    """Counts the rows of one example that layers with Gram matrices of any length see, over all their calls."""

    def __init__(self, module: nn.Module) -> None:
        self._bytes: dict[nn.Module, Callable[[int], int]] = {}
        self._seen: dict[nn.Module, int] = {}
        owners: dict[int, int] = {}
        for layer in module.modules():
            for parameter in layer.parameters(recurse=False):
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
        watched = [
            layer
            for layer in module.modules()
            if isinstance(layer, MoELayer) or (isinstance(layer, nn.Embedding) and owners[id(layer.weight)] > 1)
        ]
        self._handles = [layer.register_forward_hook(self._on_forward) for layer in watched]

    @property
    def pair_bytes(self) -> int:
        """Bytes for each pair of examples of a unit: of the layer that takes most, for they come one by one."""
        return max((self._bytes[layer](rows) for layer, rows in self._seen.items()), default=0)

    def close(self) -> None:
        """Detach."""
        for handle in self._handles:
            handle.remove()

    def _on_forward(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        self._seen[layer] = self._seen.get(layer, 0) + math.prod(inputs[0].shape[1:2])
        if isinstance(layer, MoELayer):
            top_k = layer.router.top_k
            # At worst all tokens choose the same experts.
            self._bytes[layer] = lambda rows: _GRAM_BYTES * top_k * rows * rows
        else:
            self._bytes[layer] = lambda rows: _TIED_BYTES * rows * rows
