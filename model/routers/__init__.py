"""Routers: which experts see a token, and with what weight.

Every router implements ``route(x_BTD, allowed_E) -> Routing``; see :class:`model.routers.routing.Router` for what all
of them promise, and one file each for what they compute.
"""

from __future__ import annotations

from collections.abc import Sequence

from model.config import ExpertsConfig
from model.router_config import (
    AttentionRouterConfig,
    HierarchicalRouterConfig,
    PolicyRouterConfig,
    SigmoidRouterConfig,
    TopPRouterConfig,
)
from model.routers.attention import AttentionRouter
from model.routers.group_limited import GroupLimitedRouter
from model.routers.hierarchical import HierarchicalRouter
from model.routers.penalties import entropy, example_balance_loss, uniform_balance_loss, z_loss
from model.routers.policy import PolicyRouter, plackett_luce, reinforced
from model.routers.routing import Router, Routing
from model.routers.sigmoid import SigmoidRouter, moved_bias
from model.routers.softmax import SoftmaxRouter
from model.routers.top_p import TopPRouter

__all__ = [
    "AttentionRouter",
    "GroupLimitedRouter",
    "HierarchicalRouter",
    "PolicyRouter",
    "Router",
    "Routing",
    "SigmoidRouter",
    "SoftmaxRouter",
    "TopPRouter",
    "entropy",
    "example_balance_loss",
    "make_router",
    "moved_bias",
    "plackett_luce",
    "reinforced",
    "uniform_balance_loss",
    "z_loss",
]


def make_router(config: ExpertsConfig, held: Sequence[int], width: int, *, causal: bool) -> Router:
    """Return the configured router for the experts in ``held`` (global ids, ascending).

    causal: no token may learn of those after it.
    """
    match config.router:
        case SigmoidRouterConfig() as options:
            return SigmoidRouter(width, len(held), config.top_k, options)
        case AttentionRouterConfig() as options:
            return AttentionRouter(width, len(held), config.top_k, options, causal=causal)
        case HierarchicalRouterConfig() as options:
            kind = HierarchicalRouter if options.style == "learned" else GroupLimitedRouter
            return kind(width, held, config.routed, config.top_k, options)
        case PolicyRouterConfig() as options:
            return PolicyRouter(width, len(held), config.top_k, options)
        case TopPRouterConfig() as options:
            return TopPRouter(width, len(held), config.top_k, options)
        case options:
            return SoftmaxRouter(width, len(held), config.top_k, options)
