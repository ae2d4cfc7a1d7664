"""How good a model is on a node's held-out units: each unit's value of the task's metric, summed and noised."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from conclave.clients.capacity import room_for
from conclave.clients.whole_pass import contained, whole_pass
from conclave.model import parameters
from conclave.model.building import from_state
from conclave.model.experts.config import HeldExperts
from conclave.model.network import Network
from conclave.model.records import Batch, Records
from conclave.privacy.randomness import derive
from conclave.privacy.releases.private_metrics import MetricSums
from conclave.protocol.plan import Plan


def evaluate(
    plan: Plan, held: HeldExperts, tensors: Mapping[str, Tensor], held_out: Records, secret: bytes
) -> dict[str, Tensor]:
    """Evaluate a model with the held experts on held-out records; return what may be released.

    Guarantee: the Gaussian mechanism of the plan's evaluation under add/remove of one unit.

    Args:
        tensors: wire name → float32, the model for exactly ``held``.
        held_out: the node's records that never train.
        secret: of this charge.
    """
    if plan.evaluation is None:
        raise ValueError("the plan has no evaluation")
    (name,) = plan.metric_shapes
    sums = metric_sums(plan, held, tensors, held_out)
    return {name: sums.noised(plan.evaluation.noise_multiplier, derive(secret, name))}


def metric_sums(plan: Plan, held: HeldExperts, tensors: Mapping[str, Tensor], held_out: Records) -> MetricSums:
    """Return the sums before their noise. Never release them."""
    network = from_state(plan.model, held, parameters.join(tensors, held)).eval()
    sums = MetricSums()
    with torch.inference_mode():
        for physical, batch in whole_pass(plan, held_out, room_for(plan, held)):
            value_B = _all_values(plan, network, physical.example_B, batch)
            if physical.of_unit is None:
                sums.add(value_B, physical.units)
            else:
                sums.add_part(value_B, physical.of_unit if physical.last else None)
    return sums


def _all_values(plan: Plan, network: Network, example_B: Tensor, batch: Batch) -> Tensor:
    """As :func:`_values`, and the worst value for a record that the model fails on."""
    worst = torch.full((1,), 0.0 if plan.metric[0] == "accuracy" else 1.0, dtype=torch.float64)
    found = contained(lambda _, part: _values(plan, network, part), example_B, batch)
    return torch.cat([worst if value_B is None else value_B for value_B in found])


def _values(plan: Plan, network: Network, batch: Batch) -> Tensor:
    """Return the metric of each example, in [0, 1], shape [B]."""
    output = network(batch)
    metric, bound = plan.metric
    if metric == "accuracy":
        return torch.eq(output.scores.argmax(dim=1), batch["label"]).double()
    bits_B = network.task_loss(output, batch).double() / (bound * math.log(2.0))
    return torch.where(bits_B.isfinite(), bits_B, 1.0)  # where a model fails it has learned nothing
