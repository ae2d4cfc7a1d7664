"""What a router answers, and the steps that all routers share.

Dimension suffixes: B batch, T tokens, D width, E experts held, K experts per token, G groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from conclave.base.errors import BadInputError
from conclave.model.layers.unit_random import unit_uniform
from conclave.model.routers.config import RouterOptions
from conclave.model.routers.penalties import entropy, example_balance_loss, uniform_balance_loss, z_loss


class Routing(NamedTuple):
    """A routing decision.

    weights_BTK: float, weight of each chosen expert; sums to 1 over K.
    experts_BTK: int64, local index of each chosen expert, best first.
    aux_B: float, the example's load-balancing loss, which ``experts.balance`` weighs.
    penalty_B: float, further terms of the example's loss, already weighed; None if the router has none.
    log_prob_B: float, log-probability of the example's choices; None if experts were not sampled.
    used_BTK: bool, the slots that hold an expert; None if all do. An unused slot has weight exactly 0.
    """

    weights_BTK: Tensor
    experts_BTK: Tensor
    aux_B: Tensor
    penalty_B: Tensor | None = None
    log_prob_B: Tensor | None = None
    used_BTK: Tensor | None = None

    def load(self, held: int) -> Tensor:
        """Return how many tokens each expert received, int64 [held]. As sensitive as the batch."""
        chosen = self.experts_BTK if self.used_BTK is None else self.experts_BTK[self.used_BTK]
        return torch.bincount(chosen.flatten(), minlength=held)

    def mean_experts(self) -> Tensor:
        """Return how many experts a token of each example uses on average, float [B]. As sensitive as the batch."""
        if self.used_BTK is None:
            return torch.full_like(self.aux_B, self.experts_BTK.shape[-1])
        return self.used_BTK.sum(-1).to(self.aux_B.dtype).mean(1)


class Scores(NamedTuple):
    """What a router thinks of every expert.

    logits_BTE: their softmax is the router's distribution; −inf where forbidden, finite elsewhere.
    raw: scores whose log-sum-exp over the last axis the z-loss keeps small, [B, …, n]; None if it has no meaning.
    group_BTG: log-probability of each group; None if there are no groups.
    """

    logits_BTE: Tensor
    raw: Tensor | None = None
    group_BTG: Tensor | None = None


class Router(nn.Module, ABC):
    """Scores every expert, chooses ``top_k`` for each token, and says what that costs besides the task.

    A router's output for one example depends on that example alone, and routing changes no state: both are conditions
    of per-unit differential privacy. A forbidden expert is masked with −inf, never with 0, which a selection bias
    could lift above the allowed ones.

    A ``selection_bias`` [E, 1], where there is one, changes which experts are chosen and never their weights. It has a
    row per expert and travels with it. It is not a parameter: training never changes it, so a node returns for it a
    difference of exactly 0. Whoever balances moves it with :func:`conclave.model.routers.sigmoid.moved_bias`.

    A module named ``common`` holds what belongs to no single expert and travels with the shared weights
    (:mod:`conclave.model.parameters`); every other tensor has a row per expert.
    """

    selection_bias: Tensor | None

    def __init__(
        self, held: int, top_k: int, options: RouterOptions, *, noise: float = 0.0, z_weight: float = 0.0
    ) -> None:
        super().__init__()
        self.top_k, self.options, self.noise, self.z_weight = top_k, options, noise, z_weight
        self.register_buffer("selection_bias", torch.zeros(held, 1) if options.biased else None)

    def route(self, x_BTD: Tensor, allowed_E: Tensor) -> Routing:
        """Choose experts for every token.

        Args:
            x_BTD: tokens.
            allowed_E: bool, the experts that may be chosen. A forbidden one is never among the chosen, and its rows
                have a gradient of exactly 0.

        Raises:
            BadInputError: fewer than ``top_k`` experts are allowed.
        """
        allowed = int(allowed_E.sum())
        if allowed < self.top_k:
            raise BadInputError(f"top_k is {self.top_k}, must be at most the {allowed} experts present")
        scores = self.score_experts(x_BTD, allowed_E)
        with torch.no_grad():
            experts_BTK = self.choose(scores, allowed_E)
            used_BTK = self.used(scores.logits_BTE, experts_BTK)
        chosen_BTK = scores.logits_BTE.gather(-1, experts_BTK)
        if used_BTK is not None:
            chosen_BTK = chosen_BTK.masked_fill(~used_BTK, float("-inf"))
        return Routing(
            # Normalised from logits: a chosen probability may have underflowed to 0, and 0/0 is no weight.
            weights_BTK=chosen_BTK.softmax(dim=-1),
            experts_BTK=experts_BTK,
            aux_B=self._balance(scores.logits_BTE, experts_BTK, used_BTK, allowed_E, allowed),
            penalty_B=self._penalty(scores, allowed_E),
            log_prob_B=self.log_probability(scores.logits_BTE, experts_BTK),
            used_BTK=used_BTK,
        )

    @abstractmethod
    def score_experts(self, x_BTD: Tensor, allowed_E: Tensor) -> Scores:
        """Score every expert for every token."""

    def choose(self, scores: Scores, allowed_E: Tensor) -> Tensor:
        """Return the chosen experts, int64 [B, T, K], best first."""
        # By logit: a probability can underflow to the 0 of a forbidden expert, a logit never to its −inf.
        logits_BTE = self.explored(scores.logits_BTE)
        if self.selection_bias is not None:
            logits_BTE = logits_BTE + self.selection_bias[:, 0]
        return logits_BTE.topk(self.top_k, dim=-1).indices

    def used(self, logits_BTE: Tensor, experts_BTK: Tensor) -> Tensor | None:
        """Return which slots hold an expert, bool [B, T, K], or None for all."""
        return None

    def log_probability(self, logits_BTE: Tensor, experts_BTK: Tensor) -> Tensor | None:
        """Return the log-probability of the example's choices, [B], where they were sampled."""
        return None

    def explored(self, scores: Tensor) -> Tensor:
        """Add exploration noise while training; every example has its own draws."""
        return scores + self.noise * gumbel_like(scores) if self.training and self.noise else scores

    def _balance(
        self, logits_BTE: Tensor, experts_BTK: Tensor, used_BTK: Tensor | None, allowed_E: Tensor, allowed: int
    ) -> Tensor:
        if self.options.balance_loss == "uniform":
            return uniform_balance_loss(logits_BTE, allowed_E)
        return example_balance_loss(logits_BTE.softmax(dim=-1), experts_BTK, allowed, used_BTK)

    def _penalty(self, scores: Scores, allowed_E: Tensor) -> Tensor | None:
        terms = []
        if self.z_weight and scores.raw is not None:
            terms.append(self.z_weight * z_loss(scores.raw))
        if self.options.entropy:
            terms.append(-self.options.entropy * entropy(scores.logits_BTE, allowed_E))
        return torch.stack(terms).sum(0) if terms else None


def gumbel_like(scores: Tensor) -> Tensor:
    """Return standard Gumbel noise of the shape of ``scores``, with its own draws for each example.

    The draws are uniforms in (0, 1); a generator's exact 0 is moved inside, for its noise would be −inf, a mask.
    """
    uniform = unit_uniform(scores).double().clamp(min=2.0**-53).view(scores.shape)
    return -(-uniform.log()).log().to(device=scores.device, dtype=scores.dtype)
