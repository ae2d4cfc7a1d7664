"""Normal values: the method against a naive one, and the law of four million values of one fixed secret.

The secret is fixed, so no test fails by chance. Each states its false-alarm rate: the probability that an exact
sampler would fail it under a secret drawn afresh. Together they are below 1e-4.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import special, stats

from conclave.privacy.randomness import PAIRS, _box_muller, derive, standard_normal, uniform_words

SECRET = derive(bytes(32), "normal")
BLOCK = 2 * PAIRS
COUNT = 1000 * BLOCK


@pytest.fixture(scope="module")
def values():
    return standard_normal(SECRET, COUNT).numpy()


@pytest.fixture(scope="module")
def halves(values):
    """The two values of each pair, [2, pairs]."""
    return values.reshape(-1, 2, PAIRS).swapaxes(0, 1).reshape(2, -1)


def naive(words):
    """Box–Muller in extended precision from the same words, [2, N]."""
    radius_word, angle_word = words.astype(np.longdouble)
    radius = np.sqrt(-2 * np.log((np.abs(radius_word) + 0.5) / np.longdouble(2.0**63)))
    angle = np.pi * np.longdouble(0.5) * angle_word / np.longdouble(2.0**63)
    sign = np.where(radius_word < 0, -1, 1)
    return sign * radius * np.stack([np.cos(angle), np.sin(angle)])


def box_muller(words):
    out = np.empty(words.shape)
    _box_muller(words, out, torch.empty(3, words.shape[1], dtype=torch.float64))
    return out


def test_values_are_box_muller_of_the_keystream():
    words = uniform_words(SECRET, 3 * BLOCK).view(np.int64).reshape(3, 2, PAIRS)
    expected = np.stack([naive(block) for block in words]).astype(np.float64).reshape(-1)
    assert np.abs(standard_normal(SECRET, 3 * BLOCK).numpy() - expected).max() < 1e-14


def test_extreme_words_give_finite_values_and_the_stated_tail():
    ends = [-(2**63), -(2**62), -(2**52), -1, 0, 1, 2**10, 2**52, 2**62, 2**63 - 1]
    words = np.array(list(itertools.product(ends, ends)), dtype=np.int64).T.copy()
    got = box_muller(words)
    assert np.isfinite(got).all()
    # Near u = 1 the radius is √(2(1 − u)), and 1 − u has steps of 2^-53: an error there is an error of 2^-53 in u.
    error = np.abs(got - naive(words)).max(axis=0)
    assert error[np.abs(words[0].astype(float)) <= 2.0**62].max() < 1e-14
    assert error.max() < 1e-9
    radius = np.hypot(*got)
    assert radius.max() == pytest.approx(np.sqrt(128 * np.log(2)), rel=1e-15)
    # P(R > r) = exp(−r²/2) is the uniform itself, also at 2^-64: the tail keeps its relative precision.
    uniform = (np.abs(words[0].astype(np.longdouble)) + 0.5) / 2.0**63
    assert np.exp(-(radius**2) / 2) == pytest.approx(uniform.astype(np.float64), rel=2.0**-44)


def test_a_value_depends_on_secret_and_index_alone():
    longest = standard_normal(SECRET, 3 * BLOCK + 5)
    for count in (0, 1, 2, 7, PAIRS - 1, PAIRS, PAIRS + 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 1):
        part = standard_normal(SECRET, count)
        assert part.shape == (count,)
        assert part.dtype == torch.float64
        assert torch.equal(part, longest[:count])
    assert len(torch.unique(longest)) == len(longest)  # no block repeats another
    assert not torch.isin(standard_normal(derive(SECRET, "x"), BLOCK), longest).any()


def test_the_number_of_threads_changes_no_bit():
    before = torch.get_num_threads()
    try:
        drawn = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            drawn.append(standard_normal(SECRET, 50 * BLOCK))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*drawn)


def test_kolmogorov_smirnov(values, halves):
    # Four tests at 1e-6 each. The radius follows a Rayleigh law, and the sum of all pairs' halves is normal again.
    assert stats.kstest(values, "norm").pvalue > 1e-6
    assert stats.kstest(halves[0], "norm").pvalue > 1e-6
    assert stats.kstest(halves[1], "norm").pvalue > 1e-6
    assert stats.kstest(np.hypot(*halves), "rayleigh").pvalue > 1e-6


def test_chi_squared_on_fine_bins_and_tails(values):
    # 1,016 bins: 998 of equal probability in the middle and nine in each tail, out to 4.42 (20 values expected
    # beyond it). False alarm 1e-6.
    tail = np.array([5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3])
    lower = np.concatenate([tail, np.linspace(2e-3, 0.5, 500)])
    edges = np.concatenate([special.ndtri(lower), -special.ndtri(lower[-2::-1])])
    probability = np.diff(np.concatenate([[0.0], lower, 1.0 - lower[-2::-1], [1.0]]))
    counts = np.bincount(np.searchsorted(edges, values), minlength=len(edges) + 1)
    assert (COUNT * probability).min() > 20
    assert stats.chisquare(counts, COUNT * probability).pvalue > 1e-6


def test_far_tails_hold_the_expected_number(values):
    # Poisson counts beyond 4.5 and 5 on each side: four tests, two tails of 1e-7 each, false alarm ≤ 8e-7.
    for threshold, side in itertools.product((4.5, 5.0), (1, -1)):
        expected = stats.poisson(COUNT * special.ndtr(-threshold))
        assert expected.ppf(1e-7) <= np.count_nonzero(side * values > threshold) <= expected.ppf(1 - 1e-7)


def test_moments(values):
    # Eight moments at 5 standard errors: false alarm 8 · 6e-7, a little more for the high ones.
    def moment(order):
        return float(special.factorial2(order - 1)) if order % 2 == 0 else 0.0

    for order in range(1, 9):
        error = np.sqrt((moment(2 * order) - moment(order) ** 2) / COUNT)
        assert abs(np.mean(values**order) - moment(order)) < 5 * error


def test_the_halves_of_a_pair_are_independent(halves):
    # Correlations of values, magnitudes and squares at 5 standard errors (2e-6), and two χ² tests at 1e-6.
    pairs = halves.shape[1]
    for f in (np.asarray, np.abs, np.square):
        assert abs(np.corrcoef(f(halves[0]), f(halves[1]))[0, 1]) < 5 / np.sqrt(pairs)
    turn = np.arctan2(halves[1], halves[0]) / (2 * np.pi) + 0.5
    survival = np.exp(-np.sum(halves**2, axis=0) / 2)  # uniform, and independent of the angle
    cells = np.minimum((turn * 64).astype(int), 63) * 32 + np.minimum((survival * 32).astype(int), 31)
    assert stats.chisquare(np.bincount(cells, minlength=64 * 32)).pvalue > 1e-6
    uniform = special.ndtr(halves)
    cells = np.minimum((uniform * 40).astype(int), 39)
    assert stats.chisquare(np.bincount(cells[0] * 40 + cells[1], minlength=1600)).pvalue > 1e-6


def test_neighbours_blocks_and_secrets_are_uncorrelated(values):
    # 6 correlations at 5 standard errors: false alarm 4e-6.
    for lag in (1, 2, PAIRS, PAIRS + 1, BLOCK):
        assert abs(np.corrcoef(values[lag:], values[:-lag])[0, 1]) < 5 / np.sqrt(COUNT - lag)
    other = standard_normal(derive(SECRET, "x"), COUNT).numpy()
    assert abs(np.corrcoef(values, other)[0, 1]) < 5 / np.sqrt(COUNT)
