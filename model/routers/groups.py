"""Groups of experts: by global id, so that every holder sees the same ones.

Expert e of E belongs to group ``e·G // E``. A holder of some experts sees groups of uneven size, or empty ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def groups_of(held: Sequence[int], routed: int, groups: int) -> tuple[int, ...]:
    """Return the group of each held expert; ids ascend, so equal groups are adjacent."""
    return tuple(expert * groups // routed for expert in held)


def sizes_of(group_of: Sequence[int], groups: int) -> list[int]:
    """Return how many of the held experts each group has."""
    return [sum(group == wanted for group in group_of) for wanted in range(groups)]


def present_groups(group_of: Sequence[int], groups: int, allowed_E: Tensor) -> Tensor:
    """Return how many allowed experts each group has, int64 [G]."""
    group_E = torch.tensor(group_of, device=allowed_E.device)
    return torch.zeros(groups, dtype=torch.int64, device=allowed_E.device).index_add_(0, group_E, allowed_E.long())


def in_best_groups(
    score_BTG: Tensor, group_of: Sequence[int], allowed_E: Tensor, top_groups: int, top_k: int
) -> Tensor:
    """Return which experts a token may choose from, bool [B, T, E]: those allowed in its best groups.

    A group without an allowed expert is skipped. A token takes its ``top_groups`` best groups, and where these hold
    fewer than ``top_k`` allowed experts, as happens to a holder of a few, the next best until they suffice. Equal
    scores are decided in favour of the lower group.
    """
    groups = score_BTG.shape[-1]
    size_G = present_groups(group_of, groups, allowed_E)
    order_BTG = score_BTG.masked_fill(size_G == 0, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    size_BTG = size_G[order_BTG]
    before_BTG = size_BTG.cumsum(-1) - size_BTG
    taken_BTG = (torch.arange(groups, device=score_BTG.device) < top_groups) | (before_BTG < top_k)
    by_group_BTG = torch.zeros_like(taken_BTG).scatter(-1, order_BTG, taken_BTG)
    return by_group_BTG[..., torch.tensor(group_of, device=score_BTG.device)] & allowed_E
