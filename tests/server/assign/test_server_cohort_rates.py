"""Cohorts are drawn at exactly the configured rate, and independently; binomial and χ² tails of 1e-8 each."""

from __future__ import annotations

from collections import Counter

import pytest
from scipy import stats

from conclave.server.assign.cohort import choose_cohort
from conclave.server.assign.config import FixedCohort, PoissonCohort

NODES = [f"node-{number:02d}" for number in range(20)]
ROUNDS, TAIL = 2000, 1e-8


def cohorts(config):
    return [choose_cohort(NODES, config, 5, number) for number in range(ROUNDS)]


def within(count, distribution) -> bool:
    return distribution.ppf(TAIL) <= count <= distribution.ppf(1 - TAIL)


@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_poisson_sizes_have_the_binomial_mean_and_variance(rate):
    sizes = [len(cohort) for cohort in cohorts(PoissonCohort(kind="poisson", rate=rate))]
    assert within(sum(sizes), stats.binom(ROUNDS * 20, rate))
    # A binomial size is no normal variable: compare counts of each size, rare sizes pooled, by Pearson's χ².
    expected = [ROUNDS * stats.binom(20, rate).pmf(size) for size in range(21)]
    observed = [sizes.count(size) for size in range(21)]
    common = [size for size in range(21) if expected[size] >= 10]
    cells = [(observed[size], expected[size]) for size in common]
    cells.append((ROUNDS - sum(o for o, _ in cells), ROUNDS - sum(e for _, e in cells)))
    assert sum((o - e) ** 2 / e for o, e in cells) <= stats.chi2(len(cells) - 1).ppf(1 - TAIL)


@pytest.mark.parametrize(
    ("config", "rate"),
    [(PoissonCohort(kind="poisson", rate=0.3), 0.3), (FixedCohort(kind="fixed", size=7), 7 / 20)],
    ids=lambda value: getattr(value, "kind", None),
)
def test_every_node_is_as_likely(config, rate):
    counts = Counter(node for cohort in cohorts(config) for node in cohort)
    assert all(within(counts[node], stats.binom(ROUNDS, rate)) for node in NODES)  # 40 tails: false alarm ≤ 4e-7
