"""Assignment of experts: pure, within capacity, ascending, and balanced where asked."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.assignment import assign

SETTINGS = settings(max_examples=100, deadline=None, derandomize=True, database=None)
KINDS = ["all", "random", "balanced"]
capacities = st.dictionaries(st.text("abcdef", min_size=1, max_size=4), st.integers(1, 12), max_size=9)


def deal(kind, caps, *, experts=8, per_node=3, layers=2, seed=1, round_number=1):
    return assign(
        kind,
        capacities=caps,
        experts=experts,
        per_node=per_node,
        layers=layers,
        seed=seed,
        round_number=round_number,
    )


def holders(assigned, layer, experts):
    counts = Counter(e for held in assigned.values() for e in held[layer])
    return [counts[e] for e in range(experts)]


@SETTINGS
@given(st.sampled_from(KINDS), capacities, st.integers(1, 8), st.integers(1, 8), st.integers(1, 3), st.integers())
def test_every_assignment_is_well_formed_and_pure(kind, caps, experts, per_node, layers, seed):
    assigned = deal(kind, caps, experts=experts, per_node=per_node, layers=layers, seed=seed)
    assert assigned.keys() == caps.keys()
    for node, held in assigned.items():
        assert sorted(held) == list(range(layers))
        for ids in held.values():
            assert list(ids) == sorted(set(ids))
            assert set(ids) <= set(range(experts))
            wanted = experts if kind == "all" else per_node
            assert len(ids) == min(wanted, caps[node], experts)
    backwards = dict(reversed(caps.items()))
    assert deal(kind, backwards, experts=experts, per_node=per_node, layers=layers, seed=seed) == assigned


@SETTINGS
@given(st.integers(1, 15), st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
def test_balanced_holders_differ_by_at_most_one_when_capacities_are_equal(nodes, experts, per_node, seed):
    caps = {f"n{n}": 9 for n in range(nodes)}
    assigned = deal("balanced", caps, experts=experts, per_node=per_node, seed=seed)
    for layer in range(2):
        counts = holders(assigned, layer, experts)
        assert max(counts) - min(counts) <= 1
        assert sum(counts) == nodes * min(per_node, experts)


def test_all_gives_everything():
    assert deal("all", {"a": 8, "b": 99}) == {n: {0: tuple(range(8)), 1: tuple(range(8))} for n in "ab"}


def test_capacity_caps_each_node_by_itself():
    assigned = deal("balanced", {"small": 1, "large": 8}, per_node=5)
    assert {n: len(held[0]) for n, held in assigned.items()} == {"small": 1, "large": 5}


@pytest.mark.parametrize("kind", ["random", "balanced"])
def test_rounds_seeds_and_layers_differ(kind):
    caps = {f"n{n}": 8 for n in range(6)}
    dealt = [deal(kind, caps, seed=s, round_number=r) for s, r in [(1, 1), (1, 2), (2, 1)]]
    layers = [tuple(held[layer] for held in d.values()) for d in dealt for layer in (0, 1)]
    assert len(set(layers)) == 6  # 56⁶ equally likely random assignments: a coincidence in 2e9


@pytest.mark.parametrize("kind", ["random", "balanced"])
def test_over_rounds_every_node_gets_every_expert_equally_often(kind):
    caps = {f"n{n}": 8 for n in range(4)}
    rounds = 800
    counts = Counter()
    for r in range(rounds):
        for node, held in deal(kind, caps, layers=1, round_number=r).items():
            counts.update((node, e) for e in held[0])
    # Each of 32 counts is binomial(800, 3/8): 300 ± 13.7; 5.5 deviations: false alarm 1.2e-6.
    assert all(abs(counts[f"n{n}", e] - 300) < 5.5 * 13.7 for n in range(4) for e in range(8))
