"""A worker's replies in memory that both processes map: written once, read once, no socket in between."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_RAM = Path("/dev/shm")  # noqa: S108  (a file without a name; where there is no such folder, the default one)


def anonymous_file() -> int:
    """Return the descriptor of a nameless file, in memory where the system allows; it goes with its last user."""
    with tempfile.TemporaryFile(dir=_RAM if _RAM.is_dir() else None) as stream:
        return os.dup(stream.fileno())


@dataclass
class _Slot:
    offset: int = 0
    capacity: int = 0


class SlotWriter:
    """The worker's side: a few slots, used in turn.

    A slot may be used again once its content has been read. The pool sees to it: it hands a worker its next
    message only after reading the reply to the one ``slots`` before.
    """

    def __init__(self, descriptor: int, slots: int) -> None:
        self._descriptor = descriptor
        self._slots = [_Slot() for _ in range(slots)]
        self._turn = 0
        self._end = 0
        self._memory: mmap.mmap | None = None

    def write(self, content: bytes) -> int:
        """Put ``content`` into the next slot and return its offset."""
        slot = self._next(len(content))
        if content and self._memory is not None:
            self._memory[slot.offset : slot.offset + len(content)] = content
        return slot.offset

    def write_tensors(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """Put float32 tensors side by side into the next slot, one copy; return offset and size in bytes."""
        size = 4 * sum(tensor.numel() for tensor in tensors.values())
        slot = self._next(size)
        if size and self._memory is not None:
            flat = torch.frombuffer(self._memory, dtype=torch.float32, offset=slot.offset, count=size // 4)
            start = 0
            for tensor in tensors.values():
                flat[start : start + tensor.numel()].view(tensor.shape).copy_(tensor.detach())
                start += tensor.numel()
        return slot.offset, size

    def _next(self, size: int) -> _Slot:
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % len(self._slots)
        if size > slot.capacity:  # a new place at the end: what other slots hold may not be read yet
            slot.offset, slot.capacity = self._end, -(-size // 64) * 64  # keep every slot aligned
            self._end += slot.capacity
            os.ftruncate(self._descriptor, self._end)
            self._memory = mmap.mmap(self._descriptor, self._end)
        return slot


class SlotReader:
    """The pool's side."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._memory: mmap.mmap | None = None

    def read(self, offset: int, size: int) -> bytes:
        """Return a copy of ``size`` bytes at ``offset``."""
        if size == 0:
            return b""
        return self._map(offset + size)[offset : offset + size]

    def read_tensors(self, offset: int, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Return a copy of the tensors that :meth:`SlotWriter.write_tensors` put at ``offset``."""
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        count = sum(sizes.values())
        if count == 0:
            return {name: torch.zeros(tuple(shape)) for name, shape in shapes.items()}
        memory = self._map(offset + 4 * count)
        flat = torch.frombuffer(memory, dtype=torch.float32, offset=offset, count=count).clone()
        parts = flat.split(list(sizes.values()))
        return {name: part.view(tuple(shapes[name])) for name, part in zip(shapes, parts, strict=True)}

    def _map(self, end: int) -> mmap.mmap:
        if self._memory is None or len(self._memory) < end:
            self._memory = mmap.mmap(self._descriptor, os.fstat(self._descriptor).st_size)
        return self._memory

    def close(self) -> None:
        """Unmap and close."""
        os.close(self._descriptor)  # the mapping goes with its last view
