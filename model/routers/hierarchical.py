"""First groups, then experts of the chosen groups, with learned group scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from conclave.model.routers.config import HierarchicalRouterConfig
from conclave.model.routers.groups import groups_of, in_best_groups, present_groups, sizes_of
from conclave.model.routers.routing import Router, Scores


class HierarchicalRouter(Router):
    """``p(e) = softmax over groups × softmax within the group``; the best ``top_k`` in the ``top_groups`` best groups.

    Both softmaxes run over what is allowed. The scores of groups belong to no single expert and are shared. See
    :mod:`conclave.model.routers.groups` for groups that are absent or too small.
    """

    def __init__(
        self, width: int, held: Sequence[int], routed: int, top_k: int, options: HierarchicalRouterConfig
    ) -> None:
        super().__init__(len(held), top_k, options, noise=options.noise)
        self.groups, self.top_groups = options.groups, options.top_groups
        self.group_of = groups_of(held, routed, options.groups)
        self.common = nn.ModuleDict({"group": nn.Linear(width, options.groups, bias=False)})
        self.score = nn.Linear(width, len(held), bias=False)

    def score_experts(self, x_BTD: Tensor, allowed_E: Tensor) -> Scores:
        """Score by group and within the group."""
        present_G = present_groups(self.group_of, self.groups, allowed_E) > 0
        group_BTG = self.common["group"](x_BTD).masked_fill(~present_G, float("-inf")).log_softmax(dim=-1)
        score_BTE = self.score(x_BTD).masked_fill(~allowed_E, float("-inf"))
        parts = []
        by_group = zip(
            score_BTE.split(sizes_of(self.group_of, self.groups), dim=-1),
            group_BTG.split(1, dim=-1),
            present_G.tolist(),
            strict=True,
        )
        for within, group, present in by_group:
            if present:  # a softmax over nothing is NaN, and the part of an absent group is −inf already
                within = within.log_softmax(dim=-1) + group
            parts.append(within)
        return Scores(torch.cat(parts, dim=-1).masked_fill(~allowed_E, float("-inf")), group_BTG=group_BTG)

    def choose(self, scores: Scores, allowed_E: Tensor) -> Tensor:
        """Choose groups, then experts among theirs."""
        if scores.group_BTG is None:
            raise ValueError("scores without groups")
        group_BTG = self.explored(scores.group_BTG)
        open_BTE = in_best_groups(group_BTG, self.group_of, allowed_E, self.top_groups, self.top_k)
        explored_BTE = self.explored(scores.logits_BTE).masked_fill(~open_BTE, float("-inf"))
        return explored_BTE.topk(self.top_k, dim=-1).indices
