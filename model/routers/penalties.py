"""What routing costs besides the task: balance losses, z-loss and entropy, each one value per example.

All take logits with −inf at forbidden experts and avoid 0·inf: −inf is replaced before it is multiplied.
A loss over the whole batch would make one unit's gradient depend on the others.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def example_balance_loss(prob_BTE: Tensor, experts_BTK: Tensor, allowed: int, used_BTK: Tensor | None = None) -> Tensor:
    """Load-balancing loss within each example, shape [B] (DeepSeek-V3, arXiv:2412.19437, eq. 17–20).

    ``allowed/K · Σ_e f_e·P_e``, with f_e the share of the example's tokens sent to e and P_e the mean
    probability of e over them. It is 1 when both are uniform. Where tokens use fewer than K experts (``used_BTK``),
    K is the example's mean.
    """
    top_k = experts_BTK.shape[-1]
    if used_BTK is None:
        picked_BTE = torch.zeros_like(prob_BTE).scatter(-1, experts_BTK, 1.0)
        return (picked_BTE.mean(dim=1) * prob_BTE.mean(dim=1)).sum(dim=-1) * (allowed / top_k)
    share_BE = torch.zeros_like(prob_BTE).scatter(-1, experts_BTK, used_BTK.to(prob_BTE.dtype)).mean(dim=1)
    return (share_BE * prob_BTE.mean(dim=1)).sum(dim=-1) * allowed / share_BE.sum(dim=-1)


def uniform_balance_loss(logits_BTE: Tensor, allowed_E: Tensor) -> Tensor:
    """KL divergence from the uniform distribution to the example's mean distribution over experts, shape [B], ≥ 0.

    ``−1/E·Σ_e ln P_e − ln E`` over the E allowed experts, P_e the mean probability of e over the example's tokens. Its
    only minimum, 0, is P uniform.

    Why this one for single tokens. ``f·P`` of one token is the probability of its chosen experts: its gradient
    vanishes where the router is sure of itself, so a collapsed router stays collapsed, and no term ever lifts an expert
    that nobody chooses; the same holds for Σ P². Here the gradient in the logits is ``p_e − 1/E``: affine in p, up to
    1 − 1/E where collapsed. Being affine, it adds up: over a batch it is Σ_b p_be − B/E in whatever the examples'
    logits have in common, which is the expected load of e above its fair share. So the sum of per-example gradients
    pushes like a batch-wide balance loss, without an example knowing about another. The price: it also pushes each
    token towards indecision, so that its weight must stay below what the task has to say.
    """
    log_prob_BTE = logits_BTE.log_softmax(dim=-1).masked_fill(~allowed_E, 0.0)
    tokens, allowed = log_prob_BTE.shape[1], int(allowed_E.sum())
    log_mean_BE = log_prob_BTE.logsumexp(dim=1) - math.log(tokens)  # never the logarithm of an underflowed mean
    return -log_mean_BE.masked_fill(~allowed_E, 0.0).sum(dim=-1) / allowed - math.log(allowed)


def z_loss(raw: Tensor) -> Tensor:
    """Mean of the squared log-sum-exp of scores [B, …, n], shape [B] (ST-MoE, arXiv:2202.08906, eq. 5)."""
    return raw.logsumexp(dim=-1).square().flatten(1).mean(dim=1)


def entropy(logits_BTE: Tensor, allowed_E: Tensor) -> Tensor:
    """Mean over tokens of the entropy of the distribution over experts, shape [B], in nats."""
    log_prob_BTE = logits_BTE.log_softmax(dim=-1).masked_fill(~allowed_E, 0.0)
    return -(logits_BTE.softmax(dim=-1) * log_prob_BTE).sum(dim=-1).mean(dim=1)
