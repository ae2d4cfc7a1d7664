"""The exponential mechanism: its probabilities in closed form, its bound over all neighbours, its price."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from conclave.privacy.accounting.mechanisms import ExponentialChoice
from conclave.privacy.randomness import derive
from conclave.privacy.releases.choice import SHRINK, choose


def probabilities(scores, count, epsilon, sensitivity=1.0):
    """Plackett–Luce in closed form: order → probability."""
    weights = [math.exp(SHRINK * epsilon * score / (2 * sensitivity)) for score in scores]
    result = {}
    for order in itertools.permutations(range(len(scores)), count):
        left, probability = sum(weights), 1.0
        for index in order:
            probability *= weights[index] / left
            left -= weights[index]
        result[order] = probability
    return result


def drawn(scores, count, epsilon, draws, sensitivity=1.0):
    counts: dict[tuple[int, ...], int] = {}
    for number in range(draws):
        order = choose(
            torch.tensor(scores, dtype=torch.float64),
            count=count,
            epsilon=epsilon,
            sensitivity=sensitivity,
            secret=derive(b"\7" * 32, number),
        )
        counts[tuple(order)] = counts.get(tuple(order), 0) + 1
    return counts


@pytest.mark.parametrize(("count", "sensitivity"), [(1, 1.0), (2, 1.0), (3, 0.5)])
def test_orders_come_with_the_probabilities_of_the_exponential_mechanism(count, sensitivity):
    """χ² over all orders; false alarm 1e-6 each."""
    scores, epsilon, draws = [3.0, 0.0, 1.5, 2.0], 1.3, 6000
    expected = probabilities(scores, count, epsilon, sensitivity)
    assert sum(expected.values()) == pytest.approx(1.0)
    found = drawn(scores, count, epsilon, draws, sensitivity)
    statistic = sum(
        (found.get(order, 0) - draws * probability) ** 2 / (draws * probability)
        for order, probability in expected.items()
    )
    assert statistic < stats.chi2(len(expected) - 1).isf(1e-6)


def test_no_neighbour_changes_a_probability_by_more_than_what_is_charged():
    """Every data set of up to four units, every unit removed: each unit gives each of three things 0, ½ or 1."""
    epsilon, count = 1.0, 2
    units = list(itertools.product((0.0, 0.5, 1.0), repeat=3))[::3]
    worst = 0.0
    for size in range(1, 4):
        for chosen in itertools.combinations_with_replacement(units, size):
            with_all = probabilities([sum(column) for column in zip(*chosen, strict=True)], count, epsilon)
            others = chosen[1:] or ((0.0, 0.0, 0.0),)
            without = probabilities([sum(column) for column in zip(*others, strict=True)], count, epsilon)
            worst = max(worst, *(abs(math.log(with_all[order] / without[order])) for order in with_all))
    assert worst <= count * epsilon
    assert worst > 0.2  # the bound is not met because nothing moves


def test_its_price_is_that_of_as_many_choices():
    assert ExponentialChoice(epsilon=1.0, choices=2).rdp(4.0) == pytest.approx(2 * min(1.0, 4.0 / 8))


def test_the_extremes_of_the_stream_are_finite(monkeypatch):
    words = np.array([0, 2**64 - 1, 2**63], dtype=np.uint64)
    monkeypatch.setattr("conclave.privacy.releases.choice.uniform_words", lambda secret, count: words)
    order = choose(torch.zeros(3, dtype=torch.float64), count=3, epsilon=1.0, sensitivity=1.0, secret=bytes(32))
    assert order == [1, 2, 0]


@pytest.mark.parametrize(("scores", "count"), [([1.0, math.nan], 1), ([1.0, math.inf], 1), ([1.0], 2), ([1.0], 0)])
def test_what_cannot_be_chosen_from_is_refused(scores, count):
    with pytest.raises(ValueError, match="scores must be finite"):
        choose(torch.tensor(scores, dtype=torch.float64), count=count, epsilon=1.0, sensitivity=1.0, secret=bytes(32))
