"""Which experts a token may choose from: best groups first, absent ones skipped, small ones added to."""

from __future__ import annotations

import pytest
import torch

from conclave.model.routers.groups import groups_of, in_best_groups, sizes_of

GROUPS = groups_of(range(8), 8, 4)


def open_experts(score, mask, top_groups, top_k):
    allowed = torch.tensor([c == "1" for c in mask])
    found = in_best_groups(torch.tensor([[score]]), GROUPS, allowed, top_groups, top_k)
    return found[0, 0].nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("score", "mask", "top_groups", "top_k", "expected"),
    [
        ([1.0, 4.0, 3.0, 2.0], "11111111", 1, 2, [2, 3]),
        ([1.0, 4.0, 3.0, 2.0], "11111111", 2, 2, [2, 3, 4, 5]),
        ([-1.0, 0.0, -3.0, -2.0], "11001111", 2, 2, [0, 1, 6, 7]),  # group 1 is absent, whatever its score
        ([1.0, 4.0, 3.0, 2.0], "11101111", 1, 2, [2, 4, 5]),  # group 1 has one: the next best is added
        ([1.0, 4.0, 3.0, 2.0], "10100001", 1, 3, [0, 2, 7]),
        ([2.0, 2.0, 2.0, 2.0], "11111111", 2, 2, [0, 1, 2, 3]),  # equal scores: the lower group
    ],
)
def test_best_groups(score, mask, top_groups, top_k, expected):
    assert open_experts(score, mask, top_groups, top_k) == expected


@pytest.mark.parametrize("held", [(0, 1, 2, 3, 4, 5), (1, 4, 5), (3,), (0, 5)])
def test_groups_follow_global_ids(held):
    assert groups_of(held, 6, 3) == tuple(e // 2 for e in held)
    assert sizes_of(groups_of(held, 6, 3), 3) == [sum(e // 2 == g for e in held) for g in range(3)]
