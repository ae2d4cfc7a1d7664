"""Attention as a router: what a token asks for depends on its context.

Dimension suffixes: H heads, W head width, X tokens × heads, and those of :mod:`model.routers.routing`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from model.router_config import AttentionRouterConfig
from model.routers.routing import Router, Scores


class AttentionRouter(Router):
    """Several queries from a token and its context, each a softmax over the experts' keys; their mean decides.

    The context is the mean of the example's tokens: all of them, or, where the model is causal, the token and those
    before it. As in multi-query attention (Shazeer 2019, arXiv:1911.02150) heads share the keys, so that an expert has
    one key of width D/H. The mean of softmaxes is not one softmax: an expert can be sure of its tokens for several
    reasons.
    """

    def __init__(self, width: int, held: int, top_k: int, options: AttentionRouterConfig, *, causal: bool) -> None:
        super().__init__(top_k, options, noise=options.noise, z_weight=options.z_loss)
        self.heads, self.causal = options.heads, causal
        self.common = nn.ModuleDict({"query": nn.Linear(2 * width, width, bias=False)})
        self.key = nn.Linear(width // options.heads, held, bias=False)

    def score_experts(self, x_BTD: Tensor, allowed_E: Tensor) -> Scores:
        """Score by the mean of the heads' softmaxes."""
        batch, tokens, _ = x_BTD.shape
        seen_BTD = torch.cat([x_BTD, context(x_BTD, causal=self.causal)], dim=-1)
        # Heads stand beside the tokens: Opacus's ghost mode knows no linear layer on four axes.
        query_BXW = self.common["query"](seen_BTD).view(batch, tokens * self.heads, -1)
        raw_BTHE = self.key(query_BXW).view(batch, tokens, self.heads, -1).masked_fill(~allowed_E, float("-inf"))
        # 0 in place of −inf, masked again afterwards: the gradient of a log-sum-exp of nothing but −inf is NaN.
        log_prob_BTHE = raw_BTHE.log_softmax(dim=-1).masked_fill(~allowed_E, 0.0)
        logits_BTE = (log_prob_BTHE.logsumexp(dim=2) - math.log(self.heads)).masked_fill(~allowed_E, float("-inf"))
        return Scores(logits_BTE, raw=raw_BTHE)


def context(x_BTD: Tensor, *, causal: bool) -> Tensor:
    """Return for each token the mean of its example's tokens, or of itself and those before it; [B, T, D]."""
    if not causal:
        return x_BTD.mean(dim=1, keepdim=True).expand_as(x_BTD)
    count_T1 = torch.arange(1, x_BTD.shape[1] + 1, device=x_BTD.device, dtype=x_BTD.dtype).unsqueeze(1)
    return x_BTD.cumsum(dim=1) / count_T1
