"""The mixture-of-experts layer: route, dispatch rows to experts, combine.

Dimension suffixes: B batch, T tokens, D width, E experts held, K experts per token, N = B·T·K rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from conclave.model.experts.config import ExpertsConfig
from conclave.model.experts.stacked import RoutedExperts, SharedExpert
from conclave.model.routers.kinds import make_router
from conclave.model.routers.routing import Routing


class Dispatch(NamedTuple):
    """Rows of all (token, chosen expert) pairs, sorted by (expert, example, token).

    order_N: int64, sorted row → position in the flattened [B, T, K] choice. Slots that hold no expert have no row.
    offsets_E: int32, exclusive end of each expert's rows.
    example_N: int64, sorted row → example.
    """

    order_N: Tensor
    offsets_E: Tensor
    example_N: Tensor


def dispatch(experts_BTK: Tensor, held: int, used_BTK: Tensor | None = None) -> Dispatch:
    """Sort the chosen (token, expert) pairs by expert; if ``used_BTK`` is given, only those in it.

    Nothing is dropped: there is no capacity limit, because what it drops would depend on the other examples.
    """
    _, tokens, top_k = experts_BTK.shape
    flat_N = experts_BTK.reshape(-1)
    if used_BTK is not None:
        flat_N = flat_N.masked_fill(~used_BTK.reshape(-1), held)  # behind all experts, and cut off there
    order_N = torch.argsort(flat_N, stable=True)  # stable: examples stay in order within an expert
    offsets_E = torch.bincount(flat_N, minlength=held)[:held].cumsum(0).to(torch.int32)
    if used_BTK is not None:
        order_N = order_N[: int(offsets_E[-1])]
    return Dispatch(order_N, offsets_E, order_N // (tokens * top_k))


class MoELayer(nn.Module):
    """Shared experts plus the routed experts of each token; ``held`` are the global ids of those present."""

    def __init__(self, config: ExpertsConfig, held: Sequence[int], width: int, *, causal: bool = False) -> None:
        super().__init__()
        self.held = len(held)
        self.router = make_router(config.router, held, width, routed=config.routed, top_k=config.top_k, causal=causal)
        self.experts = RoutedExperts(config, len(held), width)
        self.shared = SharedExpert(config, width) if config.shared else None

    def forward(self, x_BTD: Tensor, allowed_E: Tensor) -> tuple[Tensor, Routing]:
        """Return the layer's output (same shape as ``x_BTD``) and the routing it used."""
        batch, tokens, width = x_BTD.shape
        routing = self.router.route(x_BTD, allowed_E)
        top_k = routing.experts_BTK.shape[-1]
        plan = dispatch(routing.experts_BTK, self.held, routing.used_BTK)
        token_N = plan.order_N // top_k
        rows_ND = x_BTD.reshape(-1, width).index_select(0, token_N)
        example_B = torch.arange(batch, device=x_BTD.device)
        out_ND = self.experts(rows_ND, plan.offsets_E, plan.example_N, example_B)
        weight_N1 = routing.weights_BTK.reshape(-1, 1).index_select(0, plan.order_N)
        # A token's rows are added in the order of its experts, whatever rows of other examples lie between them.
        y_BTD = out_ND.new_zeros(batch * tokens, width).index_add_(0, token_N, out_ND * weight_N1)
        y_BTD = y_BTD.view(batch, tokens, width)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD)
        return y_BTD, routing
