"""The whole model: encoder → blocks → head, for any set of experts held locally."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.config import HeldExperts, ModelConfig
from model.encoders import ImagePatchEncoder
from model.heads import ClassificationHead
from model.initialisation import initialise
from model.moe import MoELayer
from model.routers import Routing

Batch = Mapping[str, Tensor]
"""Named tensors whose first axis is the example, for instance ``{"image": …, "label": …}``."""


@dataclass(frozen=True)
class Output:
    """What a forward pass returns: the head's output, the auxiliary loss per example, the routing per layer."""

    scores_BC: Tensor
    aux_B: Tensor
    routing: tuple[Routing, ...]


def make_norm(config: ModelConfig) -> nn.Module:
    """Return the configured normalisation; each acts on one token alone."""
    return nn.RMSNorm(config.width) if config.norm == "rms" else nn.Identity()


class Block(nn.Module):
    """Pre-norm residual block around an MoE layer."""

    def __init__(self, config: ModelConfig, held: int) -> None:
        super().__init__()
        self.norm = make_norm(config)
        self.moe = MoELayer(config.experts, held, config.width)

    def forward(self, x_BTD: Tensor, allowed_E: Tensor) -> tuple[Tensor, Routing]:
        """Return the block's output and the routing of its MoE layer."""
        y_BTD, routing = self.moe(self.norm(x_BTD), allowed_E)
        return x_BTD + y_BTD, routing


class Network(nn.Module):
    """A mixture-of-experts model that holds only the experts in ``held``.

    The forward pass changes no state: no running statistics, no load counters.
    """

    def __init__(self, config: ModelConfig, held: HeldExperts) -> None:
        super().__init__()
        self.config = config
        self.held = held
        self.encoder = ImagePatchEncoder(config.encoder, config.width)
        self.blocks = nn.ModuleList(Block(config, len(held[layer])) for layer in range(config.layers))
        self.norm = make_norm(config)
        self.head = ClassificationHead(config.head, config.width)

    def forward(self, batch: Batch, allowed: Mapping[int, Tensor] | None = None) -> Output:
        """Run the model on a batch.

        Args:
            batch: ``image`` float [B, C, H, W].
            allowed: layer → bool mask over the held experts; default, all of them.
        """
        x_BTD = self.encoder(batch["image"])
        aux_B = x_BTD.new_zeros(x_BTD.shape[0])
        routings = []
        for layer, block in enumerate(self.blocks):
            if allowed is None:
                allowed_E = torch.ones(len(self.held[layer]), dtype=torch.bool, device=x_BTD.device)
            else:
                allowed_E = allowed[layer]
            x_BTD, routing = block(x_BTD, allowed_E)
            aux_B = aux_B + routing.aux_B
            routings.append(routing)
        return Output(self.head(self.norm(x_BTD)), aux_B, tuple(routings))

    def synthetic_batch(self, examples: int, seed: int = 0) -> Batch:
        """Return made-up examples of the right shapes and types: for timing and checks, without data."""
        encoder, generator = self.config.encoder, torch.Generator().manual_seed(seed)
        return {
            "image": torch.rand(examples, encoder.channels, encoder.height, encoder.width, generator=generator),
            "label": torch.randint(self.config.head.classes, (examples,), generator=generator),
        }

    def loss(self, batch: Batch) -> Tensor:
        """Return the training loss of each example, shape [B]: the task's, plus ``balance`` × auxiliary."""
        output: Output = self(batch)
        task_B: Tensor = self.head.loss(output.scores_BC, batch["label"])
        return task_B + self.config.experts.balance * output.aux_B


def build(config: ModelConfig, seed: int) -> Network:
    """Build the full model with fresh weights drawn from ``seed`` (public, not private randomness)."""
    with torch.device("meta"):
        network = Network(config, config.all_experts)
    network.to_empty(device="cpu")
    for parameter in network.parameters():
        nn.init.constant_(parameter, float("nan"))  # a layer that nobody initialises must not go unnoticed
    initialise(network, torch.Generator().manual_seed(seed))
    return network


def from_state(config: ModelConfig, held: HeldExperts, state: Mapping[str, Tensor]) -> Network:
    """Build a model around existing tensors (not copied), with only the experts in ``held``.

    Raises:
        RuntimeError: a name is missing or unexpected, or a shape differs.
    """
    with torch.device("meta"):
        network = Network(config, held)
    network.load_state_dict(dict(state), assign=True)
    return network
