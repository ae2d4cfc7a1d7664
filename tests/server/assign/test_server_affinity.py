"""Choices become assignments: nobody gets fewer, every expert gets its holders, and as few choices as needed move."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from conclave.server.assign.gaps import fill_gaps

EXPERTS = 5


@some.composite
def choices(draw):
    nodes = draw(some.integers(1, 6))
    return {
        f"n{node}": draw(some.permutations(range(EXPERTS)))[: draw(some.integers(1, EXPERTS))] for node in range(nodes)
    }


def holders(held):
    return [sum(expert in ids for ids in held.values()) for expert in range(EXPERTS)]


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(choices(), some.integers(1, 2))
def test_as_many_as_wished_and_the_minimum_wherever_places_suffice(wanted, least):
    held = fill_gaps(wanted, EXPERTS, least)
    assert {node: len(ids) for node, ids in held.items()} == {node: len(ids) for node, ids in wanted.items()}
    assert all(list(ids) == sorted(set(ids)) for ids in held.values())
    short = [count for count in holders(held) if count < least]
    if short:  # then nobody has one to spare that could take a missing one
        for node, ids in held.items():
            for missing in (e for e in range(EXPERTS) if holders(held)[e] < least and e not in ids):
                assert all(holders(held)[e] <= least for e in ids), (node, missing)


@pytest.mark.parametrize("least", [1, 2])
def test_no_fewer_choices_could_move(least):
    """All choices of three nodes with three of five experts, against trying every assignment."""
    orders = list(itertools.permutations(range(EXPERTS), 3))[::7]
    choices = list(itertools.combinations(range(EXPERTS), 3))
    for wanted in itertools.islice(itertools.product(orders, repeat=3), 0, None, 29):
        named = {f"n{number}": list(order) for number, order in enumerate(wanted)}
        held = fill_gaps(named, EXPERTS, least)
        moved = sum(len(set(named[node]) - set(ids)) for node, ids in held.items())
        possible = [
            sum(len(set(w) - set(c)) for w, c in zip(wanted, each, strict=True))
            for each in itertools.product(choices, repeat=3)
            if all(sum(e in c for c in each) >= least for e in range(EXPERTS))
        ]
        if possible:
            assert min(holders(held)) >= least
            assert moved == min(possible)
        else:
            assert least == 2  # nine places, ten needed


def test_choices_that_cover_everything_are_kept():
    wanted = {"b": [4, 0], "a": [1, 2], "c": [3, 0]}
    assert fill_gaps(wanted, EXPERTS, 1) == {"a": (1, 2), "b": (0, 4), "c": (0, 3)}


def test_the_least_wanted_goes_first_and_ties_by_name():
    assert fill_gaps({"b": [0, 1], "a": [1, 0]}, 3, 1) == {"a": (1, 2), "b": (0, 1)}
    assert fill_gaps({}, 3, 1) == {}
