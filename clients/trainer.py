"""One round of local training: build only the assigned experts, train them privately, return the delta."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from clients.protocol import Plan
from data.sources import GROUP
from model import HeldExperts, ModelConfig, Network, parameters
from privacy.dpsgd import DpSgd, train_privately
from privacy.gradient_modes import Records


def mechanism_of(plan: Plan, declared_size: int) -> DpSgd:
    """Return the mechanism that a plan asks for on a node of the given declared size."""
    return DpSgd.of(
        plan.privacy,
        steps=plan.training.steps,
        learning_rate=plan.training.learning_rate,
        optimizer=plan.training.optimizer,
        noise_multiplier=plan.noise_multiplier,
        declared_size=declared_size,
    )


def _scales(plan: Plan, network: Network, held: HeldExperts) -> dict[str, float] | None:
    """Return the factors on the learning rates of experts, by parameter name."""
    if plan.training.expert_learning_rate == "same":
        return None
    return {
        name: len(held[layer]) / plan.model.experts.routed
        for layer in held
        for name, _ in network.named_parameters()
        if name.startswith(f"blocks.{layer}.moe.experts.")
    }


@lru_cache(maxsize=16)
def _skeleton(config: ModelConfig, held_per_layer: tuple[int, ...]) -> Network:
    """Build a network without weights, once per worker: which experts it is for shows in names only."""
    with torch.device("meta"):
        return Network(config, {layer: tuple(range(count)) for layer, count in enumerate(held_per_layer)})


def train(
    plan: Plan,
    held: HeldExperts,
    tensors: Mapping[str, Tensor],
    records: Records,
    declared_size: int,
    secret: bytes,
) -> dict[str, Tensor]:
    """Train the held experts, their router rows and the shared weights; return after minus before.

    Args:
        tensors: wire name → float32, exactly what a holder of ``held`` receives; not modified.
        records: the node's private records.
        secret: seeds everything random in this round.

    Returns:
        Wire name → delta, for the same names: also for experts that no token reached.
    """
    state = {name: tensor.clone() for name, tensor in parameters.join(tensors, held).items()}
    network = _skeleton(plan.model, tuple(len(held[layer]) for layer in sorted(held)))
    network.load_state_dict(state, assign=True)
    train_privately(
        network,
        network.loss,
        {name: tensor for name, tensor in records.items() if name != GROUP},
        mechanism_of(plan, declared_size),
        secret,
        group_B=records[GROUP] if plan.privacy.unit == "group" else None,
        scales=_scales(plan, network, held),
    )
    after = parameters.split(network.state_dict(), held)  # names by this round's experts
    return {name: after[name] - tensor for name, tensor in tensors.items()}
