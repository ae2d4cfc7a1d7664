"""One round of local training: build only the assigned experts, train them privately, return the delta."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor

from conclave.clients.capacity import room_for
from conclave.data.sources import GROUP
from conclave.model import parameters
from conclave.model.building import empty
from conclave.model.config import ModelConfig
from conclave.model.experts.config import HeldExperts
from conclave.model.network import Network
from conclave.model.own import EXPERT
from conclave.model.records import Records
from conclave.privacy.training.dpsgd import train_privately
from conclave.privacy.training.dpsgd_mechanism import DpSgd
from conclave.protocol.plan import Plan


@dataclass(frozen=True)
class Trained:
    """What a round of training made.

    delta: wire name → difference, to be released. loads: name → noised histogram, to be released with it. clip: the
    bound that an adaptive rule arrived at, which the node keeps for the next round; None if the bound is fixed.
    """

    delta: dict[str, Tensor]
    loads: dict[str, Tensor]
    clip: float | None


def mechanism_of(plan: Plan, declared_size: int) -> DpSgd:
    """Return the mechanism that a plan asks for on a node of the given declared size."""
    return DpSgd.of(
        plan.privacy,
        steps=plan.training.steps,
        learning_rate=plan.training.learning_rate,
        optimizer=plan.training.optimizer,
        noise_multiplier=plan.noise_multiplier,
        load_share=plan.load_share,
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
        if name.startswith(f"blocks.{layer}.moe.experts.") or _is_own_expert(name, layer)
    }


def _is_own_expert(name: str, layer: int) -> bool:
    match = EXPERT.fullmatch(name)
    return match is not None and int(match["layer"]) == layer


def _empty_network(config: ModelConfig, held: HeldExperts) -> Network:
    """Return a network without weights for these experts."""
    if config.source is not None:  # never kept: what code of the user's remembers must not outlive a charge
        return empty(config, held)
    if config.experts.router.kind == "hierarchical":  # a router with groups knows experts by their ids
        return _skeleton(config, tuple(held[layer] for layer in sorted(held)))
    return _skeleton(config, tuple(tuple(range(len(held[layer]))) for layer in sorted(held)))


@lru_cache(maxsize=16)
def _skeleton(config: ModelConfig, held_by_layer: tuple[tuple[int, ...], ...]) -> Network:
    """Build it once per worker: except with groups, only names show which experts it is for."""
    return empty(config, dict(enumerate(held_by_layer)))


def train(
    plan: Plan,
    held: HeldExperts,
    tensors: Mapping[str, Tensor],
    records: Records,
    declared_size: int,
    secret: bytes,
    *,
    clip: float | None = None,
) -> Trained:
    """Train the held experts, their router rows and the shared weights; the delta is after minus before.

    Args:
        tensors: wire name → float32, exactly what a holder of ``held`` receives; not modified.
        records: the node's private records.
        secret: seeds everything random in this round.
        clip: the current adaptive clip bound, from earlier rounds of the run; the plan's value if not given.

    Returns:
        The delta has the same names, including experts that no token reached.
    """
    state = {name: tensor.clone() for name, tensor in parameters.join(tensors, held).items()}
    network = _empty_network(plan.model, held)
    network.load_state_dict(state, assign=True)
    mechanism = mechanism_of(plan, declared_size)
    if clip is not None:
        mechanism = replace(mechanism, clip=clip)
    outcome = train_privately(
        network,
        network.loss,
        {name: tensor for name, tensor in records.items() if name != GROUP},
        mechanism,
        secret,
        group_B=records[GROUP] if plan.privacy.unit == "group" else None,
        scales=_scales(plan, network, held),
        room=room_for(plan, held),
        contain=True,
    )
    after = parameters.split(network.state_dict(), held)  # names by this round's experts
    delta = {name: after[name] - tensor for name, tensor in tensors.items()}
    return Trained(delta, dict(outcome.loads), outcome.clip if mechanism.clipping == "adaptive" else None)
