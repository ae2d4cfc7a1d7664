"""Sigmoid affinities with a selection bias: balance without an auxiliary loss.

DeepSeek-V3, arXiv:2412.19437 §2.1.2; Wang et al. 2024, arXiv:2408.15664.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conclave.model.routers.config import HierarchicalRouterConfig, SigmoidRouterConfig
from conclave.model.routers.routing import Router, Scores


class SigmoidRouter(Router):
    """The best ``top_k`` by ``sigmoid(x·e) + bias``, weighed by their affinities alone, normalised."""

    selection_bias: Tensor

    def __init__(
        self,
        width: int,
        held: int,
        top_k: int,
        options: SigmoidRouterConfig | HierarchicalRouterConfig | None = None,
    ) -> None:
        options = options or SigmoidRouterConfig()
        super().__init__(held, top_k, options, noise=options.noise)
        self.score = nn.Linear(width, held, bias=False)

    def score_experts(self, x_BTD: Tensor, allowed_E: Tensor) -> Scores:
        """Return log-affinities: their softmax is the affinities normalised, without dividing 0 by 0 in underflow."""
        return Scores(F.logsigmoid(self.score(x_BTD)).masked_fill(~allowed_E, float("-inf")))

    def choose(self, scores: Scores, allowed_E: Tensor) -> Tensor:
        """Choose by affinity plus bias."""
        return self.biased(scores, allowed_E).topk(self.top_k, dim=-1).indices

    def biased(self, scores: Scores, allowed_E: Tensor) -> Tensor:
        """Return the basis of the choice, [B, T, E], −inf where forbidden: an affinity of 0 could win by its bias."""
        affinity_BTE = self.explored(scores.logits_BTE.exp())
        return (affinity_BTE + self.selection_bias[:, 0]).masked_fill(~allowed_E, float("-inf"))


def moved_bias(bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """Return the selection bias after one move against the load: ``bias + rate·sign(mean load − load)``.

    An expert above the mean becomes less attractive by ``rate``, one below more, one at the mean stays
    (arXiv:2408.15664, algorithm 1). Pure: nothing is changed in place.

    Args:
        bias_E: float [E].
        load_E: what each expert received, any non-negative unit, [E]. Private unless public or noised.
        rate: step, > 0.
    """
    load_E = load_E.double()
    return bias_E + rate * torch.sign(load_E.mean() - load_E).to(bias_E.dtype)
