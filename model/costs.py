"""What a model costs: parameters by group, those active for one token, and operations for one token."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Size
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from conclave.model import parameters
from conclave.model.building import build
from conclave.model.config import ModelConfig

_EXAMPLES = 8


@dataclass(frozen=True)
class ModelCosts:
    """The size of a model.

    parameters: by group: shared, router, expert (all routed experts together).
    active: parameters that one token's forward pass uses: all but the experts that were not chosen for it.
    expert: parameters of one routed expert of one layer.
    flops_per_token: of one forward pass, counted while it runs; a multiplication and an addition are two. Attention
        counts every pair of tokens, masked or not. A step of training takes about three times as many.
    """

    parameters: dict[str, int]
    total: int
    active: int
    expert: int
    flops_per_token: int


def costs_of(config: ModelConfig) -> ModelCosts:
    """Work out what a model costs, by counting its parameters and running it on made-up examples."""
    counts = {"shared": 0, "router": 0, "expert": 0}
    for name, shape in parameters.shapes(config, config.all_experts).items():
        counts[parameters.owner(name).group] += shape.numel()
    experts = config.experts
    one = counts["expert"] // (config.layers * experts.routed)
    total = sum(counts.values())
    return ModelCosts(
        parameters=counts,
        total=total,
        # How many experts a model of the user's own uses for a token, nobody can tell: all it holds.
        active=total if config.source is not None else total - config.layers * (experts.routed - experts.top_k) * one,
        expert=one,
        flops_per_token=_flops(config) // (_EXAMPLES * config.encoder.token_count),
    )


def _flops(config: ModelConfig) -> int:
    network = build(config, seed=0)
    network.eval()
    aten: Any = torch.ops.aten
    # Products that torch's counter does not know.
    own = {
        aten._grouped_mm: lambda rows, weight, *_, **__: 2 * prod(rows) * weight[-1],
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    }
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=own) as counter:
        network(network.synthetic_batch(_EXAMPLES))
    return int(counter.get_total_flops())


def _attention(query: Size, key: Size, value: Size, *_: object, **__: object) -> int:
    return int(sdpa_flop_count(query, key, value))
