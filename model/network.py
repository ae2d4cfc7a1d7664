"""The whole model: encoder → blocks → head, for any set of experts held locally."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from conclave.base.errors import BadInputError
from conclave.model.attention.kinds import make_attention
from conclave.model.config import ModelConfig
from conclave.model.encoders.config import BytesConfig, ImageConvConfig, TableConfig
from conclave.model.encoders.tokens import ByteEncoder, FeatureEncoder, ImageConvEncoder, ImagePatchEncoder, RowEncoder
from conclave.model.experts.config import HeldExperts
from conclave.model.experts.moe import MoELayer
from conclave.model.heads.after_next import AfterNext
from conclave.model.heads.config import ClassificationConfig, NextByteConfig
from conclave.model.heads.scores import ClassificationHead, NextByteHead, byte_loss
from conclave.model.layers.norms import make_norm
from conclave.model.layers.padding import present_tokens
from conclave.model.records import Batch
from conclave.model.routers.config import AttentionRouterConfig, PolicyRouterConfig
from conclave.model.routers.policy import reinforced
from conclave.model.routers.routing import Routing


@dataclass(frozen=True)
class Output:
    """What a forward pass returns: the head's scores, the auxiliary loss per example, the routing per layer."""

    scores: Tensor
    aux_B: Tensor
    routing: tuple[Routing, ...]


class _Trunk(NamedTuple):
    """What precedes the head: the encoder's tokens, the last block's, the auxiliary loss, the routing, what is real."""

    embedded_BTD: Tensor
    x_BTD: Tensor
    aux_B: Tensor
    routing: tuple[Routing, ...]
    present_BT: Tensor | None


Encoder = ImagePatchEncoder | ImageConvEncoder | ByteEncoder | RowEncoder | FeatureEncoder


def make_encoder(config: ModelConfig) -> Encoder:
    """Return the configured encoder."""
    if isinstance(config.encoder, BytesConfig):
        return ByteEncoder(config.encoder, config.width)
    if isinstance(config.encoder, ImageConvConfig):
        return ImageConvEncoder(config.encoder, config.width)
    if isinstance(config.encoder, TableConfig):
        kind = RowEncoder if config.encoder.tokens == "row" else FeatureEncoder
        return kind(config.encoder, config.width)
    return ImagePatchEncoder(config.encoder, config.width)


def make_head(config: ModelConfig) -> ClassificationHead | NextByteHead:
    """Return the configured head."""
    if isinstance(config.head, ClassificationConfig):
        return ClassificationHead(config.head, config.width)
    return NextByteHead(config.width)


class Block(nn.Module):
    """Pre-norm residual block: attention if configured, then an MoE layer."""

    def __init__(self, config: ModelConfig, held: tuple[int, ...]) -> None:
        super().__init__()
        self.attention = None
        if config.attention is not None:
            self.attention_norm = make_norm(config.norm, config.width)
            self.attention = make_attention(config.attention, config.width, config.norm)
        self.norm = make_norm(config.norm, config.width)
        self.moe = MoELayer(config.experts, held, config.width, causal=config.causal)

    def forward(self, x_BTD: Tensor, allowed_E: Tensor, present_BT: Tensor | None = None) -> tuple[Tensor, Routing]:
        """Return the block's output and the routing of its MoE layer.

        Tokens of padding are zeros and stay zeros: no layer adds anything to a zero token.
        """
        if self.attention is not None:
            x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), present_BT)
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
        self.norm = make_norm(config.norm, config.width)
        self.head = make_head(config)
        self.after_next = None
        if isinstance(config.head, NextByteConfig) and config.head.after_next and config.attention is not None:
            self.after_next = AfterNext(
                config.width, config.attention, config.experts, norm=config.norm, weight=config.head.after_next
            )

    def forward(self, batch: Batch, allowed: Mapping[int, Tensor] | None = None) -> Output:
        """Run the model on a batch.

        Args:
            batch: ``image`` float [B, C, H, W], ``text`` bytes [B, T] or ``table`` float [B, features].
            allowed: layer → bool mask over the held experts; default, all of them.
        """
        trunk = self._trunk(batch, allowed)
        scores = self.head(self.norm(trunk.x_BTD), trunk.present_BT)
        return Output(scores, trunk.aux_B, trunk.routing)

    def _trunk(self, batch: Batch, allowed: Mapping[int, Tensor] | None) -> _Trunk:
        present_BT = present_tokens(batch, self._tokens(batch))
        embedded_BTD = x_BTD = self.encoder(batch[self.config.encoder.modality], present_BT)
        aux_B = x_BTD.new_zeros(x_BTD.shape[0])
        routings = []
        for layer, block in enumerate(self.blocks):
            if allowed is None:
                allowed_E = torch.ones(len(self.held[layer]), dtype=torch.bool, device=x_BTD.device)
            else:
                allowed_E = allowed[layer]
            x_BTD, routing = block(x_BTD, allowed_E, present_BT)
            aux_B = aux_B + routing.aux_B
            routings.append(routing)
        return _Trunk(embedded_BTD, x_BTD, aux_B, tuple(routings), present_BT)

    def _tokens(self, batch: Batch) -> int:
        """How many tokens each example has, padding included; a text may be shorter than the window."""
        return batch["text"].shape[-1] if self.config.encoder.kind == "bytes" else self.config.encoder.token_count

    def synthetic_batch(self, examples: int, seed: int = 0) -> Batch:
        """Return made-up examples of the right shapes and types: for timing and checks, without data."""
        encoder, head = self.config.encoder, self.config.head
        generator = torch.Generator().manual_seed(seed)
        if isinstance(encoder, BytesConfig):
            text = torch.randint(256, (examples, encoder.window), generator=generator, dtype=torch.uint8)
            return {"text": text}
        if isinstance(encoder, TableConfig):
            batch = {"table": torch.randn(examples, encoder.features, generator=generator)}
        else:
            shape = (encoder.channels, encoder.height, encoder.width)
            batch = {"image": torch.rand(examples, *shape, generator=generator)}
        if isinstance(head, ClassificationConfig):
            batch["label"] = torch.randint(head.classes, (examples,), generator=generator)
        return batch

    def task_loss(self, output: Output, batch: Batch) -> Tensor:
        """Return the task's own loss of each example, shape [B], in nats."""
        return self.head.loss(output.scores, batch)

    def loss(self, batch: Batch) -> Tensor:
        """Return the training loss of each example, shape [B]: the task's, plus what its routing costs.

        The task's is that of the head, plus ``after_next`` × the loss of the byte after next. A policy router is
        trained on several rollouts: its loss is their mean, with a gradient for the choices too.

        Raises:
            BadInputError: there is padding, and routing would count it as tokens.
        """
        router = self.config.experts.router
        if "length" in batch:
            self._refuse_counting_padding()
        if not (isinstance(router, PolicyRouterConfig) and self.training):
            task_B, trunk = self._task(batch)
            return task_B + self._routing_loss(trunk)
        rollouts = [self._task(batch) for _ in range(router.rollouts)]
        task_RB = torch.stack([task_B for task_B, _ in rollouts])
        log_prob_RB = torch.stack([_log_probability(trunk) for _, trunk in rollouts])
        routing_RB = torch.stack([self._routing_loss(trunk) for _, trunk in rollouts])
        return reinforced(task_RB, log_prob_RB) + routing_RB.mean(0)

    def _task(self, batch: Batch) -> tuple[Tensor, _Trunk]:
        """Return the loss of each example's tasks, and the forward pass it comes from."""
        trunk = self._trunk(batch, None)
        x_BTD = self.norm(trunk.x_BTD)
        if self.after_next is None:
            return self.head.loss(self.head(x_BTD, trunk.present_BT), batch), trunk
        return self._loss_of_both(self.after_next, x_BTD, trunk, batch), trunk

    def _loss_of_both(self, after_next: AfterNext, x_BTD: Tensor, trunk: _Trunk, batch: Batch) -> Tensor:
        """The loss of the next byte plus λ × the loss of the byte after it.

        One head serves both, in one call: then its norm is a joint one also where calls are told apart (Opacus's
        ghost mode refuses a layer that is called twice).
        """
        tokens = x_BTD.shape[1]
        y_BTD = after_next(trunk.x_BTD, trunk.embedded_BTD, trunk.present_BT)
        scores_BTV = self.head(torch.cat([x_BTD, y_BTD], dim=1))
        next_B = self.head.loss(scores_BTV[:, :tokens], batch)
        return next_B + after_next.weight * byte_loss(scores_BTV[:, tokens:], batch, ahead=2)

    def _routing_loss(self, trunk: _Trunk) -> Tensor:
        """Return ``balance`` × auxiliary, and the penalties that routers weigh themselves, shape [B]."""
        loss_B = self.config.experts.balance * trunk.aux_B
        for routing in trunk.routing:
            if routing.penalty_B is not None:
                loss_B = loss_B + routing.penalty_B
        return loss_B

    def _refuse_counting_padding(self) -> None:
        experts = self.config.experts
        counting = {
            "balance": experts.balance,
            "router.z_loss": getattr(experts.router, "z_loss", 0.0),
            "router.entropy": experts.router.entropy,
        }
        for key, value in counting.items():
            if value:
                raise BadInputError(
                    f"model.experts.{key} is {value}, must be 0 for examples with a length: "
                    "the routers do not tell padding from tokens"
                )
        if isinstance(experts.router, AttentionRouterConfig | PolicyRouterConfig):
            raise BadInputError(
                f"model.experts.router.kind is {experts.router.kind}, must be another for examples with a length: "
                "it does not tell padding from tokens"
            )


def _log_probability(trunk: _Trunk) -> Tensor:
    """Log-probability of all choices of a rollout, [B]: layers sample one after the other."""
    return torch.stack([routing.log_prob_B for routing in trunk.routing if routing.log_prob_B is not None]).sum(0)
