"""Routing as a policy that is learned by REINFORCE: experts are sampled, and good samples become likelier.

Dimension suffixes: R rollouts, and those of :mod:`conclave.model.routers.routing`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from conclave.model.routers.softmax import SoftmaxRouter


class PolicyRouter(SoftmaxRouter):
    """While training, ``top_k`` experts sampled without replacement; otherwise the best ``top_k``.

    Adding Gumbel noise to logits and taking the best k is a sample without replacement from their softmax, in the
    order of drawing (Kool et al. 2019, arXiv:1903.06059). Every example has its own draws.
    """

    def log_probability(self, logits_BTE: Tensor, experts_BTK: Tensor) -> Tensor | None:
        """Return the log-probability of the sample, added up over the example's tokens."""
        return plackett_luce(logits_BTE, experts_BTK).sum(dim=1) if self.training else None


def plackett_luce(logits_BTE: Tensor, experts_BTK: Tensor) -> Tensor:
    """Log-probability of drawing the experts in this order without replacement, [B, T].

    ``Σ_k (φ_k − ln Σ_{e not yet drawn} exp φ_e)`` (Plackett–Luce; Kool et al. 2020, arXiv:2002.06043, eq. 3).
    """
    chosen_BTK = logits_BTE.gather(-1, experts_BTK)
    total_BT = torch.zeros_like(chosen_BTK[..., 0])
    left_BTE = logits_BTE
    for k in range(experts_BTK.shape[-1]):
        # What is left always holds the k-th drawn itself, so the sum is never empty.
        total_BT = total_BT + chosen_BTK[..., k] - left_BTE.logsumexp(dim=-1)
        left_BTE = left_BTE.scatter(-1, experts_BTK[..., k : k + 1], float("-inf"))
    return total_BT


def reinforced(task_RB: Tensor, log_prob_RB: Tensor) -> Tensor:
    """Return a loss per example whose gradient estimates that of the expected task loss without bias, [B].

    Its gradient is the mean over rollouts of ``∇loss_r + (loss_r − baseline_r)·∇ln π_r``; the baseline is the mean of
    the other rollouts of the same example (Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"),
    independent of rollout r, and of every other example. Its value is the mean task loss: the surrogate adds 0.
    """
    rollouts = len(task_RB)
    fixed_RB = task_RB.detach()
    advantage_RB = (fixed_RB - fixed_RB.mean(0)) * (rollouts / (rollouts - 1))  # the loss less the others' mean
    surrogate_RB = advantage_RB * (log_prob_RB - log_prob_RB.detach())
    return (task_RB + surrogate_RB).mean(0)
