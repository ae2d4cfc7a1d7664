"""Tensors in memory that two processes map: written once, read in place, no socket in between.

One side writes into slots of a shared file; the other gets tensors that are views of the slot. A slot is free again
when the reader no longer holds such a view; the reader learns that from its garbage collector and tells the writer
in its next message. So a reader that keeps tensors is safe, and memory grows only by what is kept.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import sys
import tempfile
import weakref
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from flwr.app import Array
from torch import Size, Tensor

from conclave.protocol.tensor_array import TensorArray

Place = dict[str, Any]
"""Where tensors lie, as JSON: ``at``, None for no bytes; their ``layout``, and once its ``shapes``; or the ``size`` of
packed bytes."""

_KEPT_LAYOUTS = 1024  # a layout is told again after so many others; nodes hold far fewer sets of tensors
_ALIGNMENT = 16  # in floats: torch aligns its own tensors to 64 bytes, and the same alignment gives the same bits


def anonymous_file() -> int:
    """Return the descriptor of a nameless file, in memory where the system allows; it goes with its last user."""
    if sys.platform == "linux":
        return os.memfd_create("conclave-tensors")  # unlike /dev/shm, which containers keep small
    with tempfile.TemporaryFile() as stream:
        return os.dup(stream.fileno())


class _Layout:
    """Where each of several float32 tensors begins when they lie side by side, each aligned."""

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        sizes = [-(-math.prod(shape) // _ALIGNMENT) * _ALIGNMENT for shape in shapes.values()]
        starts = itertools.accumulate(sizes, initial=0)
        self._parts = [(name, tuple(shapes[name]), _strides(shapes[name]), next(starts)) for name in shapes]
        self.size = 4 * sum(sizes)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        return {name: flat.as_strided(shape, strides, start) for name, shape, strides, start in self._parts}


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _capacity(size: int) -> int:
    """The size of a slot: powers of two, so that nodes with different experts can reuse each other's slots.

    Nothing is lost by rounding up: pages nobody wrote to take no memory.
    """
    return max(mmap.ALLOCATIONGRANULARITY, 1 << (size - 1).bit_length())


class SlotWriter:
    """The side that writes: takes a free slot, or a new one at the file's end."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._end = 0
        self._memory: dict[int, mmap.mmap] = {}
        self._free: defaultdict[int, list[int]] = defaultdict(list)
        self._layouts: dict[tuple[tuple[str, Size], ...], tuple[int, _Layout]] = {}

    def write(self, array: Array) -> Place:
        """Put an array's tensors into a slot; packed bytes as they are."""
        if isinstance(array, TensorArray) and all(t.dtype == torch.float32 for t in array.tensors.values()):
            return self._write_tensors(array.tensors)
        content = array.data
        at = self._take(len(content))
        if at is not None:
            self._memory[at][: len(content)] = content
        return {"at": at, "size": len(content)}

    def free(self, slots: Iterable[int]) -> None:
        """Take back slots that the reader no longer needs (:meth:`SlotReader.freed`)."""
        for at in slots:
            self._free[len(self._memory[at])].append(at)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)  # mappings go with their last view

    def _write_tensors(self, tensors: Mapping[str, Tensor]) -> Place:
        key = tuple((name, tensor.shape) for name, tensor in tensors.items())
        place: Place = {}
        if key not in self._layouts:
            if len(self._layouts) == _KEPT_LAYOUTS:
                self._layouts.clear()
            place["shapes"] = dict(key)
            self._layouts[key] = len(self._layouts), _Layout(place["shapes"])
        place["layout"], layout = self._layouts[key]
        place["at"] = at = self._take(layout.size)
        if at is not None:
            flat = torch.frombuffer(self._memory[at], dtype=torch.float32, count=layout.size // 4)
            for name, view in layout.views(flat).items():
                view.copy_(tensors[name].detach())
        return place

    def _take(self, size: int) -> int | None:
        if size == 0:
            return None
        capacity = _capacity(size)
        if self._free[capacity]:
            return self._free[capacity].pop()  # the last one freed: its memory is the likeliest to be in a cache
        at = self._end
        self._end += capacity
        os.ftruncate(self._descriptor, self._end)
        self._memory[at] = mmap.mmap(self._descriptor, capacity, offset=at)
        return at


class SlotReader:
    """The side that reads."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._memory: dict[int, mmap.mmap] = {}
        self._layouts: dict[int, _Layout] = {}
        self._freed: deque[int] = deque()

    def read(self, place: Place) -> bytes | dict[str, Tensor]:
        """Return what :meth:`SlotWriter.write` put there: packed bytes, or tensors that are views of the slot.

        The slot stays as it is while any tensor that shares its memory exists.
        """
        at: int | None = place["at"]
        if "size" in place:
            if at is None:
                return b""
            content: bytes = self._map(at, place["size"])[: place["size"]]
            self._freed.append(at)
            return content
        number = place["layout"]
        if "shapes" in place:
            self._layouts[number] = _Layout(place["shapes"])
        layout = self._layouts[number]
        if at is None:
            return layout.views(torch.empty(0))
        # Torch keeps the object it was given a buffer of, here this memoryview, as long as the storage lives.
        view = memoryview(self._map(at, layout.size))
        weakref.finalize(view, self._freed.append, at).atexit = False
        return layout.views(torch.frombuffer(view, dtype=torch.float32))

    def freed(self) -> list[int]:
        """Return the slots whose tensors are gone, each once."""
        return [self._freed.popleft() for _ in range(len(self._freed))]

    def close(self) -> None:
        """Close the file; tensors that are still held keep their memory."""
        os.close(self._descriptor)

    def _map(self, at: int, size: int) -> mmap.mmap:
        if at not in self._memory:
            self._memory[at] = mmap.mmap(self._descriptor, _capacity(size), offset=at)
        return self._memory[at]
