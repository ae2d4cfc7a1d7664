"""Routers: which experts see a token, and with what weight.

Every router implements ``route(x_BTD, allowed_E) -> Routing``. A router's output for one example depends on
that example alone, and routing changes no state: both are conditions of per-unit differential privacy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.errors import BadInputError


class Routing(NamedTuple):
    """A routing decision.

    weights_BTK: float, weight of each chosen expert; sums to 1 over K.
    experts_BTK: int64, local index of each chosen expert, best first.
    aux_B: float, the example's auxiliary (load-balancing) loss.
    """

    weights_BTK: Tensor
    experts_BTK: Tensor
    aux_B: Tensor


class SoftmaxRouter(nn.Module):
    """Softmax over the allowed experts, the best ``top_k`` kept and renormalised to sum to one."""

    def __init__(self, width: int, held: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.score = nn.Linear(width, held, bias=False)

    def route(self, x_BTD: Tensor, allowed_E: Tensor) -> Routing:
        """Choose experts for every token.

        Args:
            x_BTD: tokens.
            allowed_E: bool, the experts that may be chosen. A forbidden one is masked with −inf, so it has
                probability exactly 0 and is never among the chosen while ``top_k`` others are allowed.

        Raises:
            BadInputError: fewer than ``top_k`` experts are allowed.
        """
        allowed = int(allowed_E.sum())
        if allowed < self.top_k:
            raise BadInputError(f"top_k is {self.top_k}, must be at most the {allowed} experts present")
        logits_BTE = self.score(x_BTD).masked_fill(~allowed_E, float("-inf"))
        # Choose by logit: a probability can underflow to the 0 of a forbidden expert, a logit never to its −inf.
        chosen_BTK, experts_BTK = logits_BTE.topk(self.top_k, dim=-1)
        aux_B = example_balance_loss(logits_BTE.softmax(dim=-1), experts_BTK, allowed)
        return Routing(chosen_BTK.softmax(dim=-1), experts_BTK, aux_B)


def example_balance_loss(prob_BTE: Tensor, experts_BTK: Tensor, allowed: int) -> Tensor:
    """Load-balancing loss within each example, shape [B] (DeepSeek-V3, arXiv:2412.19437, eq. 17–20).

    ``allowed/K · Σ_e f_e·P_e``, with f_e the share of the example's tokens sent to e and P_e the mean
    probability of e over them. It is 1 when both are uniform. The usual batch-wide form would make one
    unit's gradient depend on the others.
    """
    top_k = experts_BTK.shape[-1]
    picked_BTE = torch.zeros_like(prob_BTE).scatter(-1, experts_BTK, 1.0)
    return (picked_BTE.mean(dim=1) * prob_BTE.mean(dim=1)).sum(dim=-1) * (allowed / top_k)
