"""The plain router: softmax over experts, the best kept."""

from __future__ import annotations

from torch import Tensor, nn

from conclave.model.routers.config import PolicyRouterConfig, SoftmaxRouterConfig, TopPRouterConfig
from conclave.model.routers.routing import Router, Scores


class SoftmaxRouter(Router):
    """Softmax over the allowed experts, the best ``top_k`` kept and renormalised to sum to one."""

    def __init__(
        self,
        width: int,
        held: int,
        top_k: int,
        options: SoftmaxRouterConfig | PolicyRouterConfig | TopPRouterConfig | None = None,
    ) -> None:
        options = options or SoftmaxRouterConfig()
        super().__init__(held, top_k, options, noise=options.noise, z_weight=options.z_loss)
        self.score = nn.Linear(width, held, bias=False)

    def score_experts(self, x_BTD: Tensor, allowed_E: Tensor) -> Scores:
        """Score by one vector per expert."""
        logits_BTE = self.score(x_BTD).masked_fill(~allowed_E, float("-inf"))
        return Scores(logits_BTE, raw=logits_BTE)
