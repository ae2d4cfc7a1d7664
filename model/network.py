"""The whole model: encoder → blocks → head, for any set of experts held locally."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.attention import CausalAttention
from model.config import BytesConfig, ClassificationConfig, HeldExperts, ModelConfig
from model.encoders import ByteEncoder, ImagePatchEncoder
from model.heads import ClassificationHead, NextByteHead
from model.initialisation import initialise
from model.moe import MoELayer
from model.router_config import PolicyRouterConfig
from model.routers import Routing, reinforced

Batch = Mapping[str, Tensor]
"""Named tensors whose first axis is the example, for instance ``{"image": …, "label": …}``."""


@dataclass(frozen=True)
class Output:
    """What a forward pass returns: the head's scores, the auxiliary loss per example, the routing per layer."""

    scores: Tensor
    aux_B: Tensor
    routing: tuple[Routing, ...]


def make_encoder(config: ModelConfig) -> ImagePatchEncoder | ByteEncoder:
    """Return the configured encoder."""
    if isinstance(config.encoder, BytesConfig):
        return ByteEncoder(config.encoder, config.width)
    return ImagePatchEncoder(config.encoder, config.width)


def make_head(config: ModelConfig) -> ClassificationHead | NextByteHead:
    """Return the configured head."""
    if isinstance(config.head, ClassificationConfig):
        return ClassificationHead(config.head, config.width)
    return NextByteHead(config.width)


def make_norm(config: ModelConfig) -> nn.Module:
    """Return the configured normalisation; each acts on one token alone."""
    return nn.RMSNorm(config.width) if config.norm == "rms" else nn.Identity()


class Block(nn.Module):
    """Pre-norm residual block: attention where configured, then an MoE layer."""

    def __init__(self, config: ModelConfig, held: tuple[int, ...]) -> None:
        super().__init__()
        self.attention = None
        if config.attention is not None:
            self.attention_norm = make_norm(config)
            self.attention = CausalAttention(config.attention, config.width)
        self.norm = make_norm(config)
        self.moe = MoELayer(config.experts, held, config.width, causal=config.causal)

    def forward(self, x_BTD: Tensor, allowed_E: Tensor) -> tuple[Tensor, Routing]:
        """Return the block's output and the routing of its MoE layer."""
        if self.attention is not None:
            x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
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
        self.encoder = make_encoder(config)
        self.blocks = nn.ModuleList(Block(config, held[layer]) for layer in range(config.layers))
        self.norm = make_norm(config)
        self.head = make_head(config)

    def forward(self, batch: Batch, allowed: Mapping[int, Tensor] | None = None) -> Output:
        """Run the model on a batch.

        Args:
            batch: ``image`` float [B, C, H, W], or ``text`` bytes [B, T].
            allowed: layer → bool mask over the held experts; default, all of them.
        """
        x_BTD = self.encoder(batch["text" if self.config.encoder.kind == "bytes" else "image"])
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
        encoder, head = self.config.encoder, self.config.head
        generator = torch.Generator().manual_seed(seed)
        if isinstance(encoder, BytesConfig):
            text = torch.randint(256, (examples, encoder.window), generator=generator, dtype=torch.uint8)
            return {"text": text}
        batch = {"image": torch.rand(examples, encoder.channels, encoder.height, encoder.width, generator=generator)}
        if isinstance(head, ClassificationConfig):
            batch["label"] = torch.randint(head.classes, (examples,), generator=generator)
        return batch

    def task_loss(self, output: Output, batch: Batch) -> Tensor:
        """Return the task's own loss of each example, shape [B], in nats."""
        return self.head.loss(output.scores, batch)

    def loss(self, batch: Batch) -> Tensor:
        """Return the training loss of each example, shape [B]: the task's, plus what its routing costs.

        A policy router is trained on several rollouts: its loss is their mean, with a gradient for the choices too.
        """
        router = self.config.experts.router
        if not (isinstance(router, PolicyRouterConfig) and self.training):
            output: Output = self(batch)
            return self._with_routing(self.task_loss(output, batch), output)
        outputs: list[Output] = [self(batch) for _ in range(router.rollouts)]
        task_RB = torch.stack([self.task_loss(output, batch) for output in outputs])
        log_prob_RB = torch.stack([_log_probability(output) for output in outputs])
        regular_RB = torch.stack([self._with_routing(torch.zeros_like(o.aux_B), o) for o in outputs])
        return reinforced(task_RB, log_prob_RB) + regular_RB.mean(0)

    def _with_routing(self, loss_B: Tensor, output: Output) -> Tensor:
        """Add ``balance`` × auxiliary, and the penalties that routers weigh themselves."""
        loss_B = loss_B + self.config.experts.balance * output.aux_B
        for routing in output.routing:
            if routing.penalty_B is not None:
                loss_B = loss_B + routing.penalty_B
        return loss_B


def _log_probability(output: Output) -> Tensor:
    """Log-probability of all choices of a rollout, [B]: layers sample one after the other."""
    return torch.stack([routing.log_prob_B for routing in output.routing if routing.log_prob_B is not None]).sum(0)


def build(config: ModelConfig, seed: int) -> Network:
    """Build the full model with fresh weights drawn from ``seed`` (public, not private randomness)."""
    with torch.device("meta"):
        network = Network(config, config.all_experts)
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
        RuntimeError: a name is missing or unexpected, or a shape differs.
    """
    with torch.device("meta"):
        network = Network(config, held)
    network.load_state_dict(dict(state), assign=True)
    return network
