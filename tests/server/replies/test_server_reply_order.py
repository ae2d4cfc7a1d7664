"""The order in which replies arrive must not touch a bit of the average, also where float sums do depend on it."""

from __future__ import annotations

import itertools

import torch
from server_samples import average

from conclave.server.aggregate.aggregation import WeightedDelta

# Large values that cancel: what is left of the small ones depends on when they are added.
VALUES = [2.0**60, 1.0, -(2.0**60), 3.0, 1000.0]
NAME = "expert/0/1/up.weight"


def test_the_order_of_replies_is_irrelevant_to_the_last_bit():
    sums = {sum(order) for order in itertools.permutations(VALUES)}
    assert len(sums) > 1  # without a fixed order of summation the result would differ
    replies = [WeightedDelta(f"n{i}", 1.0, {NAME: torch.tensor([v])}) for i, v in enumerate(VALUES)]
    results = {average(order, min_holders=1)[NAME].item() for order in itertools.permutations(replies)}
    assert len(results) == 1
