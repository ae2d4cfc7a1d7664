"""A worker's replies in memory that both processes map: written once, read once, no socket in between."""

from __future__ import annotations

import mmap
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

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
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % len(self._slots)
        if len(content) > slot.capacity:  # a new place at the end: what other slots hold may not be read yet
            slot.offset, slot.capacity = self._end, len(content)
            self._end += len(content)
            os.ftruncate(self._descriptor, self._end)
            self._memory = mmap.mmap(self._descriptor, self._end)
        if content and self._memory is not None:
            self._memory[slot.offset : slot.offset + len(content)] = content
        return slot.offset


class SlotReader:
    """The pool's side."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._memory: mmap.mmap | None = None

    def read(self, offset: int, size: int) -> bytes:
        """Return a copy of ``size`` bytes at ``offset``."""
        if size == 0:
            return b""
        if self._memory is None or len(self._memory) < offset + size:
            self._memory = mmap.mmap(self._descriptor, os.fstat(self._descriptor).st_size)
        return self._memory[offset : offset + size]

    def close(self) -> None:
        """Unmap and close."""
        if self._memory is not None:
            self._memory.close()
        os.close(self._descriptor)
