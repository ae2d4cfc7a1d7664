"""Cohorts: pure functions of seed, round and the set of nodes."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from conclave.server.assign.cohort import choose_cohort, public_generator
from conclave.server.assign.config import AllNodes, FixedCohort, PoissonCohort

NODES = [f"node-{n:02d}" for n in range(20)]
KINDS = [AllNodes(), FixedCohort(kind="fixed", size=7), PoissonCohort(kind="poisson", rate=0.3)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cohort_is_a_pure_function_of_the_set_of_nodes(kind):
    expected = choose_cohort(NODES, kind, 1, 3)
    random.seed(99)
    shuffled = NODES[:]
    random.Random(5).shuffle(shuffled)
    assert choose_cohort(shuffled, kind, 1, 3) == choose_cohort(NODES, kind, 1, 3) == expected
    assert expected == sorted(set(expected))
    assert set(expected) <= set(NODES)
    assert shuffled != NODES  # the argument is left alone


@pytest.mark.parametrize("kind", KINDS[1:])
def test_seed_and_round_both_matter(kind):
    cohorts = {tuple(choose_cohort(NODES, kind, seed, r)) for seed, r in [(1, 1), (1, 2), (2, 1), (1, 11), (11, 1)]}
    assert len(cohorts) == 5  # 5 draws of at least 77,520 equally likely ones coincide once in 7,000; seeds are fixed


def test_everybody():
    assert choose_cohort(NODES, AllNodes(), 1, 1) == NODES


@pytest.mark.parametrize(("size", "expected"), [(1, 1), (7, 7), (20, 20), (50, 20)])
def test_a_fixed_cohort_has_exactly_its_size(size, expected):
    for round_number in range(1, 30):
        cohort = choose_cohort(NODES, FixedCohort(kind="fixed", size=size), 1, round_number)
        assert len(cohort) == len(set(cohort)) == expected


def test_a_fixed_cohort_favours_nobody():
    rounds = 1000
    counts = Counter(n for r in range(rounds) for n in choose_cohort(NODES, FixedCohort(kind="fixed", size=7), 1, r))
    # Each count is binomial(1000, 0.35): 350 ± 15.1. Over 20 nodes, 5.5 deviations are a false alarm of 8e-7.
    assert all(abs(counts[node] - 350) < 5.5 * 15.1 for node in NODES)


def test_a_poisson_cohort_has_its_rate_for_every_node_and_independent_choices():
    rounds, rate = 1000, 0.3
    cohorts = [choose_cohort(NODES, PoissonCohort(kind="poisson", rate=rate), 1, r) for r in range(rounds)]
    counts = Counter(node for cohort in cohorts for node in cohort)
    # Each count is binomial(1000, 0.3): 300 ± 14.5; 5.5 deviations over 20 nodes: false alarm 8e-7.
    assert all(abs(counts[node] - 300) < 5.5 * 14.5 for node in NODES)
    # Independent choices give sizes a variance of 20·0.3·0.7 = 4.2, known to ±4.5 % (√(2/1000)) from 1000 of
    # them; 5.5 deviations: false alarm below 1e-6 (normal approximation). A cohort of fixed size has variance 0.
    sizes = [len(cohort) for cohort in cohorts]
    mean = sum(sizes) / rounds
    variance = sum((s - mean) ** 2 for s in sizes) / (rounds - 1)
    assert abs(variance - 4.2) < 5.5 * 4.2 * (2 / rounds) ** 0.5


def test_a_poisson_cohort_may_be_empty_or_everybody():
    assert choose_cohort(NODES, PoissonCohort(kind="poisson", rate=1.0), 1, 1) == NODES
    assert choose_cohort(NODES[:1], PoissonCohort(kind="poisson", rate=1e-9), 1, 1) == []


def test_generators_with_other_labels_are_other_generators():
    labels = [(1, "a", 2), (1, "a", 3), (1, "b", 2), (2, "a", 2), (12, "a"), (1, "2", "a"), (1, "a2"), (1, "a", 2, 0)]
    assert len({public_generator(*label).random() for label in labels}) == len(labels)
    assert public_generator(1, "a", 2).random() == public_generator(1, "a", 2).random()
