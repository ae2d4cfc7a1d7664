"""The noise of a step, drawn while its gradient is computed: it does not depend on data.

One thread draws while the caller computes; what is left when the caller needs the noise, both draw together. Every
value is a function of a secret and its index alone, so it is the same whoever draws it, and when.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from conclave.privacy.randomness import BLOCK, TOGETHER, fill_normal

_WORTH_A_THREAD = 1 << 17  # values: 3 ms of drawing
_PIECE = TOGETHER * BLOCK  # half a MiB: one run of the array operations
_one_core = False


def keep_to_one_core() -> None:
    """Never draw ahead in this process: other processes use the other cores."""
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
    """Normal values of several secrets. A context manager: its thread ends with it, drawn or not."""

    def __init__(
        self,
        wanted: Sequence[tuple[bytes, int]],
        most_bytes: int,
        scaled: Callable[[NDArray[np.float64]], object],
    ) -> None:
        """Begin to draw.

        Args:
            wanted: secret and number of values, of each tensor.
            most_bytes: what all values may take, at 8 bytes each; tensors from the first that is too much are left out.
            scaled: is called once on every value, in arrays, to change it in place.
        """
        self._values: list[NDArray[np.float64] | None] = []
        self._counts = [count for _, count in wanted]
        self._scaled = scaled
        pieces: list[Callable[[], None]] = []
        for secret, count in wanted:
            size = -(-count // BLOCK) * BLOCK
            most_bytes -= 8 * size
            if most_bytes < 0:
                break
            values = np.empty(size)
            self._values.append(values)
            pieces += [
                partial(self._draw, secret, values[start : start + _PIECE], start // BLOCK)
                for start in range(0, size, _PIECE)
            ]
        self._work = SharedWork(pieces)

    def __enter__(self) -> NoiseAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self._work.drop()
        self._values.clear()

    def __len__(self) -> int:
        """How many tensors there is noise for: the first ones."""
        return len(self._values)

    def take(self, number: int) -> Tensor:
        """Return the values of a tensor, float64 on the CPU: those of ``standard_normal``, scaled. Only once.

        Raises:
            RuntimeError: they were taken before.
        """
        self._work.finish()
        values, self._values[number] = self._values[number], None
        if values is None:
            raise RuntimeError("noise is used once")
        return torch.from_numpy(values[: self._counts[number]])

    def _draw(self, secret: bytes, values_N: NDArray[np.float64], first_block: int) -> None:
        fill_normal(secret, values_N, first_block)
        self._scaled(values_N)


class SharedWork:
    """Calls that a second thread begins at once, and that the caller helps to finish. Their order must not matter."""

    def __init__(self, calls: Iterable[Callable[[], None]]) -> None:
        self._calls = deque(calls)
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = threading.Thread(target=self._beside, name="noise", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the system grants no further thread: the caller does it all
            self._thread = None

    def finish(self) -> None:
        """Do what is left, wait for the other thread, and raise the error that it met."""
        try:
            self._do()
        finally:
            self.drop()
        if self._failure is not None:
            raise self._failure

    def drop(self) -> None:
        """Drop what was not begun, and wait for the other thread."""
        self._calls.clear()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _beside(self) -> None:
        try:
            self._do()
        except BaseException as error:  # raised where the work is wanted
            self._failure = error

    def _do(self) -> None:
        while True:
            try:
                call = self._calls.popleft()
            except IndexError:  # also where the other thread took the last one
                return
            call()
