"""A store for computed curves that is bounded by their size, not their number."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Curve = TypeVar("Curve")


class CurveCache(Generic[Curve]):
    """Keeps what was used last, up to ``points`` numbers in all."""

    def __init__(self, points: int) -> None:
        self._room = points
        self._held = 0
        self._curves: OrderedDict[Hashable, tuple[Curve, int]] = OrderedDict()

    def get(self, key: Hashable, points: int, build: Callable[[], Curve]) -> Curve:
        """Return the curve of ``key``, built if it is not held; ``points`` is its size."""
        found = self._curves.get(key)
        if found is not None:
            self._curves.move_to_end(key)
            return found[0]
        curve = build()
        self._curves[key] = (curve, points)
        self._held += points
        while self._held > self._room and len(self._curves) > 1:
            _, (_, dropped) = self._curves.popitem(last=False)
            self._held -= dropped
        return curve
