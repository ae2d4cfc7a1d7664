"""Which experts a node would have: each one's utility to its units, and the private choice among them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Size, Tensor, nn

from conclave.clients.capacity import room_for
from conclave.clients.whole_pass import contained, whole_pass
from conclave.model import parameters
from conclave.model.building import empty
from conclave.model.experts.moe import MoELayer
from conclave.model.network import Network
from conclave.model.records import Batch, Records
from conclave.privacy.randomness import derive
from conclave.privacy.releases.choice import choose
from conclave.privacy.releases.load_histogram import LoadHistogram
from conclave.protocol.plan import Plan

SENSITIVITY = 1.0
"""A unit's tokens can all choose an expert, and no more: it moves a utility by at most 1."""


class _Silent(nn.Module):
    """Routed experts that add nothing."""

    def forward(self, rows_ND: Tensor, *_: Tensor) -> Tensor:
        return torch.zeros_like(rows_ND)


def choice_shapes(plan: Plan, capacity: int) -> dict[str, Size]:
    """Return name → shape of what a choice releases: for each layer, ids of experts, the most wanted first."""
    if plan.affinity is None:
        return {}
    count = min(plan.affinity.experts, capacity)
    return {f"choice/{layer}": Size([count]) for layer in range(plan.model.layers)}


def choice(
    plan: Plan, tensors: Mapping[str, Tensor], records: Records, capacity: int, secret: bytes
) -> dict[str, Tensor]:
    """Choose experts for every layer; float32 ids under the names of :func:`choice_shapes`.

    Guarantee: for each layer as many choices as are returned, of the plan's ε each, under add/remove of one unit.

    Args:
        tensors: the shared weights and every expert's router row: nothing of the experts themselves.
        secret: of this charge.
    """
    if plan.affinity is None:
        raise ValueError("the plan has no choices")
    chosen = {}
    for layer, utility_E in enumerate(utilities(plan, tensors, records)):
        name = f"choice/{layer}"
        ids = choose(
            utility_E,
            count=min(plan.affinity.experts, capacity),
            epsilon=plan.affinity.epsilon,
            sensitivity=SENSITIVITY,
            secret=derive(secret, name),
        )
        chosen[name] = torch.tensor(ids, dtype=torch.float32)
    return chosen


def utilities(plan: Plan, tensors: Mapping[str, Tensor], records: Records) -> list[Tensor]:
    """Return each expert's utility by layer, float64 [E]: the units' shares of tokens that choose it, added up.

    If there are several layers, what the experts of one add is left out of what the next one sees. Never
    release them.
    """
    held = plan.model.all_experts
    network = empty(plan.model, held)
    for module in network.modules():
        if isinstance(module, MoELayer):
            module.register_module("experts", _Silent())  # none came along, and none needs room here
    network.load_state_dict(parameters.join(tensors, held), assign=True)
    network.eval()
    histogram = LoadHistogram(network, noise_multiplier=0.0)
    with torch.inference_mode():
        for physical, batch in whole_pass(plan, records, room_for(plan)):
            histogram.begin_batch(physical.example_B)
            list(contained(partial(_watched, network, histogram), physical.example_B, batch))
            if physical.of_unit is None:
                histogram.end_batch(physical.units)
            else:
                histogram.end_part(physical.of_unit if physical.last else None)
    sums = histogram.take_sums()
    histogram.close()
    return list(sums.view(plan.model.layers, plan.model.experts.routed))


def _watched(network: Network, histogram: LoadHistogram, example_B: Tensor, batch: Batch) -> None:
    with histogram.watching(example_B, batch):
        network(batch)
