"""Mechanisms: their domains, joint σ in exact arithmetic, the exponential mechanism's RDP by brute force."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp

from conclave.base.errors import BadInputError
from conclave.privacy.accounting.mechanisms import ExponentialChoice, SampledGaussian, joint_noise

NOISE = st.floats(1e-150, 1e150) | st.floats(0.01, 100.0)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"sampling_rate": 0.0}, "sampling_rate is 0.0, must be above 0 and at most 1"),
        ({"sampling_rate": 1.1}, "sampling_rate is 1.1, must be above 0 and at most 1"),
        ({"sampling_rate": math.nan}, "sampling_rate is nan, must be above 0 and at most 1"),
        ({"noise_multiplier": 0.0}, "noise_multiplier is 0.0, must be finite and above 0"),
        ({"noise_multiplier": -1.0}, "noise_multiplier is -1.0, must be finite and above 0"),
        ({"noise_multiplier": math.inf}, "noise_multiplier is inf, must be finite and above 0"),
        ({"noise_multiplier": math.nan}, "noise_multiplier is nan, must be finite and above 0"),
        ({"steps": 0}, "steps is 0, must be at least 1"),
    ],
)
def test_a_gaussian_outside_its_domain_is_refused(values, sentence):
    with pytest.raises(BadInputError) as caught:
        SampledGaussian(**{"sampling_rate": 0.1, "noise_multiplier": 1.0, "steps": 1} | values)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"epsilon": 0.0}, "epsilon is 0.0, must be finite and above 0"),
        ({"epsilon": math.inf}, "epsilon is inf, must be finite and above 0"),
        ({"epsilon": math.nan}, "epsilon is nan, must be finite and above 0"),
        ({"choices": 0}, "choices is 0, must be at least 1"),
    ],
)
def test_a_choice_outside_its_domain_is_refused(values, sentence):
    with pytest.raises(BadInputError) as caught:
        ExponentialChoice(**{"epsilon": 0.1, "choices": 1} | values)
    assert str(caught.value) == sentence


@settings(deadline=None, max_examples=200)
@given(noises=st.lists(NOISE, min_size=1, max_size=6))
def test_joint_noise_is_the_largest_float_not_above_the_exact_value(noises):
    joint = joint_noise(noises)
    precision = sum(1 / Fraction(noise) ** 2 for noise in noises)
    assert Fraction(joint) ** 2 * precision <= 1
    assert Fraction(math.nextafter(joint, math.inf)) ** 2 * precision > 1


@settings(deadline=None, max_examples=50)
@given(noise=NOISE)
def test_joint_noise_of_one_release_is_its_own(noise):
    assert joint_noise([noise]) == noise


def test_joint_noise_of_known_values():
    assert joint_noise([3.0, 4.0]) == pytest.approx(2.4, rel=1e-15)
    assert joint_noise([2.0] * 4) == 1.0
    assert joint_noise(iter([1.0, math.sqrt(2), 1e9])) == pytest.approx(math.sqrt(2 / 3), rel=1e-9)


@pytest.mark.parametrize("noises", [[], [0.0], [1.0, -1.0], [math.inf], [math.nan, 1.0]])
def test_joint_noise_of_nonsense_is_refused(noises):
    with pytest.raises(BadInputError, match="must be"):
        joint_noise(noises)


def renyi(log_p, log_q, order):
    return logsumexp(order * log_p + (1 - order) * log_q) / (order - 1)


def test_the_exponential_mechanism_stays_within_the_curve_and_comes_close():
    """RDP of real exponential mechanisms over two to five options whose utilities move by up to Δ = 1."""
    generator = np.random.default_rng(11)
    tightest = 0.0
    for trial in range(2000):
        epsilon, order = 10 ** generator.uniform(-1.5, 1.2), 1 + 10 ** generator.uniform(-1, 1.5)
        before = generator.uniform(-5, 5, size=generator.integers(2, 6))
        moved = generator.choice([-1.0, 1.0], size=len(before))
        if trial % 2:
            moved = generator.uniform(-1, 1, size=len(before))
        p, q = (log_softmax(epsilon * utility / 2) for utility in (before, before + moved))
        bound = ExponentialChoice(epsilon=epsilon, choices=1).rdp(order)
        assert renyi(p, q, order) <= bound + 1e-9
        tightest = max(tightest, renyi(p, q, order) / bound)
    assert tightest > 0.95
    assert ExponentialChoice(epsilon=0.3, choices=7).rdp(4.0) == pytest.approx(7 * 4.0 * 0.3**2 / 8)
    assert ExponentialChoice(epsilon=3.0, choices=2).rdp(4.0) == 6.0
