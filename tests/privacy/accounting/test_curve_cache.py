"""The store of curves: built once while there is room, the longest unused dropped first."""

from __future__ import annotations

from conclave.privacy.accounting.curve_cache import CurveCache


def test_a_curve_is_built_once_and_the_longest_unused_makes_room():
    built = []
    cache = CurveCache(points=10)

    def get(key, points=4):
        return cache.get(key, points, lambda: built.append(key) or key.upper())

    assert [get("a"), get("b"), get("a")] == ["A", "B", "A"]
    assert built == ["a", "b"]
    get("c")  # drops b
    get("a")
    get("b")
    assert built == ["a", "b", "c", "b"]


def test_a_curve_larger_than_the_store_is_held_alone():
    built = []
    cache = CurveCache(points=10)
    for key in ("small", "large", "large", "small"):
        cache.get(key, 3 if key == "small" else 30, lambda key=key: built.append(key) or key)
    assert built == ["small", "large", "small"]
