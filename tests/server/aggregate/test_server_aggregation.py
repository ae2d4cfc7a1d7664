"""Averages against hand-computed values."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
from server_samples import average

from conclave.server.aggregate.aggregation import Averager, WeightedDelta

A, B, C = "shared/a", "expert/0/1/up.weight", "router/0/1/score.weight"


def give(node, weight, **delta):
    names = {"a": A, "b": B, "c": C}
    return WeightedDelta(node, weight, {names[key]: torch.tensor(value) for key, value in delta.items()})


def test_weighted_means_by_hand():
    replies = [
        give("n1", 100.0, a=[1.0, 0.0], b=[4.0], c=[1.0]),
        give("n2", 300.0, a=[5.0, -4.0], b=[8.0]),
        give("n3", 600.0, a=[-1.0, 2.0]),
    ]
    averaged = average(replies, min_holders=1)
    # shared: (100·1 + 300·5 − 600·1)/1000 = 1 and (−1200 + 1200)/1000 = 0
    assert averaged[A].tolist() == [1.0, 0.0]
    assert averaged[B].tolist() == [7.0]  # holders only: (400 + 2400)/400
    assert averaged[C].tolist() == [1.0]
    assert all(tensor.dtype == torch.float32 for tensor in averaged.values())


@pytest.mark.parametrize(("min_holders", "kept"), [(1, {A, B, C}), (2, {A, B}), (3, {A}), (9, {A})])
def test_too_few_holders_leave_an_expert_out_but_never_shared_weights(min_holders, kept):
    replies = [give("n1", 1.0, a=[1.0], b=[1.0], c=[1.0]), give("n2", 1.0, a=[3.0], b=[3.0])]
    averaged = average(replies, min_holders)
    assert set(averaged) == kept
    assert averaged[A].tolist() == [2.0]


def test_the_order_of_replies_does_not_touch_a_bit():
    # Large opposite values: their order decides what becomes of the small ones between them.
    values = [1e15, 1 / 3, -1e15, 7.0, 3e9]
    replies = [WeightedDelta(f"n{n}", 1.0 + n % 2, {A: torch.tensor([v])}) for n, v in enumerate(values)]
    replies = [WeightedDelta(r.node, r.weight, r.delta | ({B: r.delta[A]} if r.node < "n3" else {})) for r in replies]
    first = average(replies, 1)
    for order in itertools.permutations(replies):
        again = average(order, 1)
        assert again.keys() == first.keys()
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_no_reply_no_average():
    assert average([], 1) == {}


def test_replies_are_not_modified():
    delta = {A: torch.ones(2)}
    average([WeightedDelta("n1", 3.0, delta), WeightedDelta("n2", 5.0, delta)], 1)
    assert torch.equal(delta[A], torch.ones(2))


def test_a_contribution_in_turn_is_added_at_once_and_an_early_one_waits():
    """Memory does not grow with the cohort while replies come in order."""
    order = ["n1", "n2", "n3", "n4"]
    averager = Averager(order)
    contribution = give("n2", 1.0, a=[5.0])
    averager.add("n2", contribution)
    watched = weakref.ref(contribution)
    del contribution
    assert watched() is not None
    averager.add("n1", None)  # n1 will not come, so it is n2's turn
    assert watched() is None
    averager.add("n4", give("n4", 1.0, a=[7.0]))
    assert averager.result(1)[A].tolist() == [6.0]  # n3 never came
