"""RDP curves against dp-accounting's own, over wide ranges."""

from __future__ import annotations

import math

import numpy as np
import pytest
from absl import logging
from dp_accounting.rdp import RdpAccountant

from conclave.privacy.accounting import rdp_curves as module
from conclave.privacy.accounting.mechanisms import SampledGaussian
from conclave.privacy.accounting.order_bound import or_bound, rdp_bound
from conclave.privacy.accounting.prices import event_of
from conclave.privacy.accounting.rdp_curves import ORDERS, CurveCache, epsilon_from_curve, rdp_curves


def by_dp_accounting(q, sigma):
    logging.set_verbosity(logging.ERROR)
    event = event_of(SampledGaussian(sampling_rate=q, noise_multiplier=sigma, steps=1))
    return RdpAccountant().compose(event)


@pytest.fixture(scope="module")
def pairs():
    generator = np.random.default_rng(7)
    random = [(float(10 ** generator.uniform(-5, -0.01)), float(10 ** generator.uniform(-0.7, 1.5))) for _ in range(25)]
    return [*random, (1.0, 2.0), (1.0, 0.3), (0.999, 30.0), (1e-6, 0.2)]


def test_curves_are_those_of_dp_accounting_or_the_smaller_bound(pairs):
    curves, whole = rdp_curves(pairs), ORDERS % 1.0 == 0.0
    for pair, curve in zip(pairs, curves, strict=True):
        bounds = np.where(whole, np.inf, rdp_bound(*np.array([pair]).T, ORDERS.tolist())[0])
        theirs = or_bound(by_dp_accounting(*pair)._rdp, bounds)
        # Both take the logarithm of a sum of about 1, and theirs stops at terms of e^-30: small values differ by that.
        np.testing.assert_allclose(curve, theirs, rtol=1e-9, atol=1e-10)
    floor = by_dp_accounting(0.5, 100.0)._rdp
    assert rdp_curves([(0.5, 100.0)])[0][24] < 0.05 * floor[24]


def test_where_dp_accounting_finds_nothing_the_bound_stands():
    pair = (0.4, 4.0)
    (curve,), theirs = rdp_curves([pair]), by_dp_accounting(*pair)._rdp
    assert np.isinf(theirs[0])
    assert ORDERS[9] == 2.0
    assert np.all(curve[:9] < theirs[9])
    assert np.all(np.diff(curve) > 0.0)


def test_the_order_and_the_company_of_pairs_change_nothing(pairs):
    together = rdp_curves(pairs)
    module._kept.clear()
    alone = np.concatenate([rdp_curves([pair]) for pair in pairs[::-1]])[::-1]
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(rdp_curves([pairs[3], pairs[3]]), together[[3, 3]])
    assert rdp_curves([]).shape == (0, len(ORDERS))


def test_kept_curves_are_bounded(monkeypatch):
    monkeypatch.setattr(module, "_MOST_KEPT", 5)
    many = [(0.5, 1.0 + i / 10) for i in range(12)]
    first = rdp_curves(many)
    assert len(module._kept) == 5
    np.testing.assert_array_equal(rdp_curves(many), first)


def test_epsilon_is_that_of_dp_accounting(pairs):
    for q, sigma in pairs[:5]:
        curve = 50 * rdp_curves([(q, sigma)])[0]
        theirs = by_dp_accounting(q, sigma).compose(
            event_of(SampledGaussian(sampling_rate=q, noise_multiplier=sigma, steps=49))
        )
        assert epsilon_from_curve(curve, 1e-6) == pytest.approx(theirs.get_epsilon(1e-6), rel=1e-6, abs=1e-8)
    assert epsilon_from_curve(np.full(len(ORDERS), math.inf), 1e-6) == math.inf


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
