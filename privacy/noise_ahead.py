"""The noise of a step, drawn beside the computation of its gradient: it does not depend on data.

One thread draws while the caller computes; what is left when the caller wants the noise, both draw together. Every
value is a function of a secret and its index alone, so it is the same whoever draws it, and when.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Sequence
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privacy.randomness import BLOCK, fill_normal

_WORTH_A_THREAD = 1 << 17  # values: 3 ms of drawing
_PIECE = 32 * BLOCK
_one_core = False


def keep_to_one_core() -> None:
    """Never draw ahead in this process: other processes are at work on the other cores."""
    global _one_core
    _one_core = True


def worth_a_thread(values: int) -> bool:
    """Whether so many values take some time, and this process may use more cores than torch has threads."""
    if _one_core or values < _WORTH_A_THREAD:
        return False
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        cores = os.cpu_count() or 1
    return cores > torch.get_num_threads()


class NoiseAhead:
    """Standard normal values of several secrets. A context manager: its thread ends with it, drawn or not."""

    def __init__(self, wanted: Sequence[tuple[bytes, int]], most_bytes: int) -> None:
        """Begin to draw.

        Args:
            wanted: secret and number of values, of each tensor.
            most_bytes: what all values may take, at 8 bytes each; tensors from the first that is too much are left out.
        """
        self._values: list[NDArray[np.float64] | None] = []
        self._counts = [count for _, count in wanted]
        self._pieces: deque[tuple[bytes, NDArray[np.float64], int]] = deque()
        self._failure: BaseException | None = None
        for secret, count in wanted:
            size = -(-count // BLOCK) * BLOCK
            most_bytes -= 8 * size
            if most_bytes < 0:
                break
            values = np.empty(size)
            self._values.append(values)
            for start in range(0, size, _PIECE):
                self._pieces.append((secret, values[start : start + _PIECE], start // BLOCK))
        self._thread: threading.Thread | None = threading.Thread(target=self._draw_beside, name="noise", daemon=True)
        self._thread.start()

    def __enter__(self) -> NoiseAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._pieces.clear()
        self._join()
        self._values.clear()

    def __len__(self) -> int:
        """How many tensors there is noise for: the first ones."""
        return len(self._values)

    def take(self, number: int) -> Tensor:
        """Return the values of a tensor, float64 on the CPU, as ``standard_normal`` would: once.

        Raises:
            RuntimeError: they were taken before.
        """
        self._draw()
        self._join()
        if self._failure is not None:
            raise self._failure
        values, self._values[number] = self._values[number], None
        if values is None:
            raise RuntimeError("noise is used once")
        return torch.from_numpy(values[: self._counts[number]])

    def _draw_beside(self) -> None:
        try:
            self._draw()
        except BaseException as error:  # raised where the noise is wanted
            self._failure = error

    def _draw(self) -> None:
        while True:
            try:
                piece = self._pieces.popleft()
            except IndexError:  # the other thread took the last one
                return
            fill_normal(*piece)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
