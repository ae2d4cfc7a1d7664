"""How many bytes of tensors live at once while a piece of code runs, which torch itself reports only for GPUs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class MemoryMeter(TorchDispatchMode):
    """Watches every operation within it; ``peak`` is the most bytes that the tensors it counts took at once.

    Memory that an operation takes and frees internally is not seen.
    """

    def __init__(self, counts: Callable[[int], bool]) -> None:
        """Set up; ``counts`` says by a new tensor's number of values whether it is counted."""
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.peak = 0
        self._live = 0
        self._counts = counts
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Collection[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and take note of the memory that is new."""
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else (results,):
            if isinstance(result, Tensor):
                self._take_note(result)
        return results

    def _take_note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage._cdata, storage.nbytes()
        if place in self._known:  # a view, or changed in place
            return
        self._known.add(place)
        weakref.finalize(storage, self._known.discard, place)  # the place may be given to another
        if self._counts(size // tensor.element_size()):
            self._live += size
            self.peak = max(self.peak, self._live)
            weakref.finalize(storage, self._let_go, size)

    def _let_go(self, size: int) -> None:
        self._live -= size
