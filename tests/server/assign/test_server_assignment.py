"""Assignment of experts: pure, within capacity, ascending, and balanced where asked."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conclave.server.assign.assignment import assign

SETTINGS = settings(max_examples=100, deadline=None, derandomize=True, database=None)
KINDS = ["all", "random", "balanced", "sticky"]
capacities = st.dictionaries(st.text("abcdef", min_size=1, max_size=4), st.integers(1, 12), max_size=9)


def deal(kind, caps, *, experts=8, per_node=3, layers=2, seed=1, round_number=1, least=1, roster=None):
    return assign(
        kind,
        capacities=caps,
        experts=experts,
        per_node=per_node,
        layers=layers,
        seed=seed,
        round_number=round_number,
        min_holders=least,
        roster=roster,
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


def fewest_possible(wanted, experts):
    """The most holders that the worst-off expert can have, by trying every assignment."""
    choices = [itertools.combinations(range(experts), count) for count in wanted]
    best = 0
    for dealt in itertools.product(*map(list, choices)):
        counts = Counter(itertools.chain.from_iterable(dealt))
        best = max(best, min(counts[e] for e in range(experts)))
    return best


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 4), st.integers(0, 1000))
def test_balanced_gives_the_worst_off_expert_as_many_holders_as_any_assignment(caps, experts, seed):
    nodes = {f"n{n}": capacity for n, capacity in enumerate(caps)}
    best = fewest_possible([min(capacity, experts) for capacity in caps], experts)
    for kind, least in (("balanced", 0), ("sticky", len(caps))):
        counts = holders(deal(kind, nodes, experts=experts, per_node=4, layers=1, seed=seed, least=least), 0, experts)
        assert min(counts) == best
        assert max(counts) - best <= 1


@SETTINGS
@given(st.lists(st.integers(1, 9), min_size=1, max_size=15), st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
def test_balanced_holders_differ_by_at_most_one_whatever_the_capacities(caps, experts, per_node, seed):
    assigned = deal("balanced", {f"n{n}": c for n, c in enumerate(caps)}, experts=experts, per_node=per_node, seed=seed)
    for layer in range(2):
        counts = holders(assigned, layer, experts)
        assert max(counts) - min(counts) <= 1


rosters = st.lists(st.integers(1, 8), min_size=2, max_size=12).map(
    lambda caps: {f"n{n}": c for n, c in enumerate(caps)}
)


def missing(assigned, experts, least):
    return [sum(max(0, least - count) for count in holders(assigned, layer, experts)) for layer in range(2)]


def moved(before, after, layer):
    """Experts that nodes which are in both have gained."""
    return sum(len(set(after[n][layer]) - set(before[n][layer])) for n in before.keys() & after.keys())


@SETTINGS
@given(rosters, st.integers(2, 8), st.integers(0, 5), st.integers(0, 1000))
def test_sticky_reaches_the_minimum_with_one_swap_for_each_missing_holder(caps, experts, least, seed):
    unrepaired = deal("sticky", caps, experts=experts, per_node=8, seed=seed, least=0)
    assigned = deal("sticky", caps, experts=experts, per_node=8, seed=seed, least=least)
    reachable = min(least, sum(min(c, experts) for c in caps.values()) // experts)
    lacking = missing(unrepaired, experts, reachable)
    for layer in range(2):
        assert min(holders(assigned, layer, experts)) >= reachable
        if reachable == least:
            assert moved(unrepaired, assigned, layer) == lacking[layer]
    assert all(len(held[0]) == min(caps[n], experts) for n, held in assigned.items())


@SETTINGS
@given(rosters, st.integers(2, 8), st.integers(0, 4), st.integers(0, 1000), st.data())
def test_sticky_moves_no_more_for_a_newcomer_or_a_leaver_than_holders_are_missing(caps, experts, least, seed, data):
    leaver = data.draw(st.sampled_from(sorted(caps)))
    rest = {n: c for n, c in caps.items() if n != leaver}
    if sum(min(c, experts) for c in rest.values()) < experts * least:
        least = 0
    with_it, without = (deal("sticky", c, experts=experts, per_node=8, seed=seed, least=least) for c in (caps, rest))
    lacking = [
        missing(deal("sticky", c, experts=experts, per_node=8, seed=seed, least=0), experts, least)
        for c in (caps, rest)
    ]
    for layer in range(2):
        assert moved(with_it, without, layer) <= lacking[0][layer] + lacking[1][layer]


def test_sticky_is_the_same_in_every_round_and_a_round_without_a_node_moves_only_for_who_is_missing():
    caps = {f"n{n}": 1 + n % 4 for n in range(20)}
    home = deal("sticky", caps, per_node=4, least=2)
    assert deal("sticky", caps, per_node=4, least=2, round_number=77) == home
    assert deal("sticky", caps, per_node=4, least=2, seed=2) != home
    some = {n: c for n, c in caps.items() if n not in ("n3", "n7", "n12")}
    absent = deal("sticky", some, per_node=4, least=2, roster=caps)
    lacking = missing({n: held for n, held in home.items() if n in some}, 8, 2)
    assert [moved(home, absent, layer) for layer in (0, 1)] == lacking
    assert all(min(holders(absent, layer, 8)) >= 2 for layer in (0, 1))
    assert deal("sticky", caps, per_node=4, least=2, roster=caps) == home


def test_sticky_with_more_room_keeps_what_it_had():
    caps = {f"n{n}": 3 for n in range(30)}
    before = deal("sticky", caps, per_node=8, least=0)
    after = deal("sticky", caps | {"n5": 4}, per_node=8, least=0)
    assert {n for n in caps if before[n] != after[n]} == {"n5"}
    assert all(set(before["n5"][layer]) < set(after["n5"][layer]) for layer in (0, 1))


def test_sticky_spreads_experts_evenly_over_nodes_on_average():
    counts = Counter()
    for n in range(2000):
        counts.update(deal("sticky", {f"n{n}": 3}, layers=1, least=0)[f"n{n}"][0])
    # Each of 8 counts is binomial(2000, 3/8): 750 ± 21.7; 5.5 deviations: false alarm 3e-7.
    assert all(abs(counts[e] - 750) < 5.5 * 21.7 for e in range(8))
