"""The router that a configuration asks for."""

from __future__ import annotations

from collections.abc import Sequence

from conclave.model.routers.attention import AttentionRouter
from conclave.model.routers.config import (
    AttentionRouterConfig,
    HierarchicalRouterConfig,
    PolicyRouterConfig,
    RouterConfig,
    SigmoidRouterConfig,
    TopPRouterConfig,
)
from conclave.model.routers.group_limited import GroupLimitedRouter
from conclave.model.routers.hierarchical import HierarchicalRouter
from conclave.model.routers.policy import PolicyRouter
from conclave.model.routers.routing import Router
from conclave.model.routers.sigmoid import SigmoidRouter
from conclave.model.routers.softmax import SoftmaxRouter
from conclave.model.routers.top_p import TopPRouter


def make_router(
    config: RouterConfig, held: Sequence[int], width: int, *, routed: int, top_k: int, causal: bool
) -> Router:
    """Return the configured router for the experts in ``held`` (global ids, ascending).

    Args:
        routed: experts of the whole layer.
        top_k: experts active for a token.
        causal: no token may learn of those after it.
    """
    match config:
        case SigmoidRouterConfig() as options:
            return SigmoidRouter(width, len(held), top_k, options)
        case AttentionRouterConfig() as options:
            return AttentionRouter(width, len(held), top_k, options, causal=causal)
        case HierarchicalRouterConfig() as options:
            kind = HierarchicalRouter if options.style == "learned" else GroupLimitedRouter
            return kind(width, held, routed, top_k, options)
        case PolicyRouterConfig() as options:
            return PolicyRouter(width, len(held), top_k, options)
        case TopPRouterConfig() as options:
            return TopPRouter(width, len(held), top_k, options)
        case options:
            return SoftmaxRouter(width, len(held), top_k, options)
