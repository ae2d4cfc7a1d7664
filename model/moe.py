"""The mixture-of-experts layer: route, dispatch rows to experts, combine.

Dimension suffixes: B batch, T tokens, D width, E experts held, K experts per token, N = B·T·K rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.config import ExpertsConfig
from model.experts import RoutedExperts, SharedExpert
from model.routers import Routing, SoftmaxRouter


class Dispatch(NamedTuple):
    """Rows of all (token, chosen expert) pairs, sorted by (expert, example, token).

    order_N: int64, sorted row → position in the flattened [B, T, K] choice.
    offsets_E: int32, exclusive end of each expert's rows.
    example_N: int64, sorted row → example.
    """

    order_N: Tensor
    offsets_E: Tensor
    example_N: Tensor


def dispatch(experts_BTK: Tensor, held: int) -> Dispatch:
    """Sort the chosen (token, expert) pairs by expert.

    Nothing is dropped: there is no capacity limit, because what it drops would depend on the other examples.
    """
    _, tokens, top_k = experts_BTK.shape
    flat_N = experts_BTK.reshape(-1)
    order_N = torch.argsort(flat_N, stable=True)  # stable: examples stay in order within an expert
    offsets_E = torch.bincount(flat_N, minlength=held).cumsum(0).to(torch.int32)
    return Dispatch(order_N, offsets_E, order_N // (tokens * top_k))


class MoELayer(nn.Module):
    """Shared experts plus the ``top_k`` routed experts of each token."""

    def __init__(self, config: ExpertsConfig, held: int, width: int) -> None:
        super().__init__()
        self.held = held
        self.router = SoftmaxRouter(width, held, config.top_k)
        self.experts = RoutedExperts(config, held, width)
        self.shared = SharedExpert(config, width) if config.shared else None

    def forward(self, x_BTD: Tensor, allowed_E: Tensor) -> tuple[Tensor, Routing]:
        """Return the layer's output (same shape as ``x_BTD``) and the routing it used."""
        batch, tokens, width = x_BTD.shape
        routing = self.router.route(x_BTD, allowed_E)
        top_k = routing.experts_BTK.shape[-1]
        plan = dispatch(routing.experts_BTK, self.held)
        rows_ND = x_BTD.reshape(-1, width)[plan.order_N // top_k]
        example_B = torch.arange(batch, device=x_BTD.device)
        out_ND = self.experts(rows_ND, plan.offsets_E, plan.example_N, example_B)
        # Undo the sort by gathering: each token's K rows come back side by side, in a fixed order.
        back_N = torch.empty_like(plan.order_N)
        back_N[plan.order_N] = torch.arange(len(back_N), device=x_BTD.device)
        out_BTKD = out_ND[back_N].view(batch, tokens, top_k, width)
        y_BTD = (out_BTKD * routing.weights_BTK.unsqueeze(-1)).sum(dim=2)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD)
        return y_BTD, routing
