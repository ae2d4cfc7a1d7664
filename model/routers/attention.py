"""Attention as a router: what a token asks for depends on its context.

Dimension suffixes: H heads, Q values of all queries, X tokens × heads, and those of
:mod:`conclave.model.routers.routing`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from conclave.model.routers.config import AttentionRouterConfig
from conclave.model.routers.routing import Router, Scores


class AttentionRouter(Router):
    """Several queries from a token and its context, each a softmax over the experts' keys; their mean decides.

    The context is the mean of the example's tokens: all of them, or, where the model is causal, the token and those
    before it. As in multi-query attention (Shazeer 2019, arXiv:1911.02150) heads share the keys, so that an expert has
    one. Keys are short: few dimensions tell experts apart, and are less prone to collapse (Chi et al. 2022,
    arXiv:2204.09179). The mean of softmaxes is not one softmax: an expert can be sure of its tokens for several
    reasons.
    """

    def __init__(self, width: int, held: int, top_k: int, options: AttentionRouterConfig, *, causal: bool) -> None:
        super().__init__(held, top_k, options, noise=options.noise, z_weight=options.z_loss)
        self.heads, self.causal = options.heads, causal
        wide = options.heads * options.key_width
        self.common = nn.ModuleDict(
            {"query": nn.Linear(width, wide, bias=False), "context": nn.Linear(width, wide, bias=False)}
        )
        self.key = nn.Linear(options.key_width, held, bias=False)

    def score_experts(self, x_BTD: Tensor, allowed_E: Tensor) -> Scores:
        """Score by the mean of the heads' softmaxes."""
        batch, tokens, _ = x_BTD.shape
        query_BTQ = self.common["query"](x_BTD) + self.common["context"](context(x_BTD, causal=self.causal))
        # Heads stand beside the tokens: Opacus's ghost mode knows no linear layer on four axes.
        score_BXE = self.key(query_BTQ.view(batch, tokens * self.heads, -1))
        raw_BTHE = score_BXE.view(batch, tokens, self.heads, -1).masked_fill(~allowed_E, float("-inf"))
        # 0 in place of −inf, masked again afterwards: the gradient of a log-sum-exp of nothing but −inf is NaN.
        log_prob_BTHE = raw_BTHE.log_softmax(dim=-1).masked_fill(~allowed_E, 0.0)
        logits_BTE = (log_prob_BTHE.logsumexp(dim=2) - math.log(self.heads)).masked_fill(~allowed_E, float("-inf"))
        return Scores(logits_BTE, raw=raw_BTHE)


def context(x_BTD: Tensor, *, causal: bool) -> Tensor:
    """Return the mean of an example's tokens, [B, 1, D], or for each token of itself and those before it, [B, T, D]."""
    if not causal:
        return x_BTD.mean(dim=1, keepdim=True)
    count_T1 = torch.arange(1, x_BTD.shape[1] + 1, device=x_BTD.device, dtype=x_BTD.dtype).unsqueeze(1)
    return x_BTD.cumsum(dim=1) / count_T1
