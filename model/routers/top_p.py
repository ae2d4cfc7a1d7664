"""Adaptive computation: a token that is sure of its experts uses few of them."""

from __future__ import annotations

import torch
from torch import Tensor

from conclave.model.routers.config import TopPRouterConfig
from conclave.model.routers.softmax import SoftmaxRouter


class TopPRouter(SoftmaxRouter):
    """The fewest best experts whose probabilities reach ``mass``: at least one, at most ``top_k``.

    As nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751) applied to experts (Huang et al. 2024,
    arXiv:2403.07652). A slot that is not used is not computed: the layer dispatches no row for it.
    """

    def __init__(self, width: int, held: int, top_k: int, options: TopPRouterConfig) -> None:
        super().__init__(width, held, top_k, options)
        self.mass = options.mass

    def used(self, logits_BTE: Tensor, experts_BTK: Tensor) -> Tensor:
        """Use an expert while those before it have less than the mass."""
        prob_BTK = logits_BTE.softmax(dim=-1).gather(-1, experts_BTK)
        before_BTK = torch.cat([torch.zeros_like(prob_BTK[..., :1]), prob_BTK[..., :-1].cumsum(-1)], dim=-1)
        return before_BTK < self.mass
