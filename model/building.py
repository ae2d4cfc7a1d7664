"""Networks from a configuration: empty, with fresh weights, or around given ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from conclave.model.config import ModelConfig
from conclave.model.experts.config import HeldExperts
from conclave.model.initialisation import initialise
from conclave.model.network import Network
from conclave.model.own import OwnNetwork


def empty(config: ModelConfig, held: HeldExperts) -> Network:
    """Return a network for these experts, whose weights are still to be loaded.

    Raises:
        BadInputError: the user's own model cannot be built.
    """
    if config.source is not None:  # a module of the user's may not know what to do on the meta device
        return OwnNetwork(config, held)
    with torch.device("meta"):
        return Network(config, held)


def build(config: ModelConfig, seed: int, held: HeldExperts | None = None) -> Network:
    """Build a model with fresh weights drawn from ``seed`` (public, not private randomness).

    Args:
        held: the experts to build it for; all if not given.

    Raises:
        BadInputError: the user's own model cannot be built.
    """
    held = config.all_experts if held is None else held
    if config.source is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return empty(config, held)
    network = empty(config, held)
    network.to_empty(device="cpu")
    for parameter in network.parameters():
        nn.init.constant_(parameter, float("nan"))  # a layer that nobody initialises must not go unnoticed
    for buffer in network.buffers():
        buffer.fill_(float("nan"))
    initialise(network, torch.Generator().manual_seed(seed))
    return network


def from_state(config: ModelConfig, held: HeldExperts, state: Mapping[str, Tensor]) -> Network:
    """Build a model around existing tensors (not copied), with only the experts in ``held``.

    Raises:
        BadInputError: the user's own model cannot be built.
        RuntimeError: a name is missing or unexpected, or a shape differs.
    """
    network = empty(config, held)
    network.load_state_dict(dict(state), assign=True)
    return network
