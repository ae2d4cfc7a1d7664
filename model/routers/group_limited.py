"""First groups, then experts of the chosen groups, by the experts' own affinities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from conclave.model.routers.config import HierarchicalRouterConfig
from conclave.model.routers.groups import groups_of, in_best_groups, sizes_of
from conclave.model.routers.routing import Scores
from conclave.model.routers.sigmoid import SigmoidRouter


class GroupLimitedRouter(SigmoidRouter):
    """DeepSeek-V3's node-limited routing (arXiv:2412.19437 §2.1.2): sigmoid affinities, few groups for each token.

    A group counts as much as its best two experts by affinity plus bias, or its only allowed one. The best ``top_k``
    are taken from the ``top_groups`` best groups; see :mod:`conclave.model.routers.groups` for groups that are absent
    or small.
    """

    def __init__(
        self, width: int, held: Sequence[int], routed: int, top_k: int, options: HierarchicalRouterConfig
    ) -> None:
        super().__init__(width, len(held), top_k, options)
        self.groups, self.top_groups = options.groups, options.top_groups
        self.group_of = groups_of(held, routed, options.groups)

    def choose(self, scores: Scores, allowed_E: Tensor) -> Tensor:
        """Choose groups, then experts among theirs."""
        biased_BTE = self.biased(scores, allowed_E)
        best_two = [part.topk(min(2, part.shape[-1]), dim=-1).values for part in biased_BTE.split(self.sizes(), dim=-1)]
        group_BTG = torch.stack([best.masked_fill(best == float("-inf"), 0.0).sum(-1) for best in best_two], dim=-1)
        open_BTE = in_best_groups(group_BTG, self.group_of, allowed_E, self.top_groups, self.top_k)
        return biased_BTE.masked_fill(~open_BTE, float("-inf")).topk(self.top_k, dim=-1).indices

    def sizes(self) -> list[int]:
        """Return how many experts of each group are held."""
        return sizes_of(self.group_of, self.groups)
