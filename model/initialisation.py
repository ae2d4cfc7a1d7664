"""Fresh weights for every kind of layer, in one fixed order from one generator."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from conclave.model.attention.latent import LatentAttention
from conclave.model.attention.multi_head import MultiHeadAttention
from conclave.model.encoders.oriented_filters import oriented_filters
from conclave.model.encoders.tokens import (
    ByteEncoder,
    FeatureEncoder,
    ImageConvEncoder,
    ImagePatchEncoder,
    PositionTable,
    RowEncoder,
)
from conclave.model.experts.stacked import RoutedExperts, SharedExpert
from conclave.model.heads.after_next import AfterNext
from conclave.model.heads.scores import ClassificationHead, NextByteHead
from conclave.model.routers.routing import Router

if TYPE_CHECKING:
    from conclave.model.network import Network

_POSITION_STD = 0.02  # small, so that content dominates at first


@torch.no_grad()
def initialise(network: Network, generator: torch.Generator) -> None:
    """Draw all weights of a network in place; see :class:`conclave.model.config.InitConfig` for the scales."""
    init = network.config.init
    copies = init.experts == "copies"
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            _draw(module.weight, math.prod(module.weight.shape[1:]), init.conv, generator)
        elif isinstance(module, ImagePatchEncoder | ImageConvEncoder | RowEncoder):
            if module.embed is not None:
                _draw(module.embed.weight, module.embed.in_features, init.embed, generator)
        elif isinstance(module, FeatureEncoder):
            _draw(module.vectors.weight, 1, init.embed, generator)
        elif isinstance(module, PositionTable):
            module.weight.normal_(0.0, _POSITION_STD, generator=generator)
        elif isinstance(module, Router):
            _draw_router(module, init.router, generator)
        elif isinstance(module, RoutedExperts):
            for weight in module.weights_into_hidden():
                _draw_experts(weight, init.up, generator, copies=copies)
            _draw_experts(module.get_parameter("down.weight"), init.down, generator, copies=copies)
        elif isinstance(module, SharedExpert):
            for weight in module.weights_into_hidden():
                _draw(weight, weight.shape[1], init.up, generator)
            down = module.get_parameter("down.weight")
            _draw(down, down.shape[1], init.down, generator)
        elif isinstance(module, ByteEncoder):
            _draw(module.table.weight, 1, init.embed, generator)
        elif isinstance(module, MultiHeadAttention | LatentAttention):
            for layer in module.children():
                if isinstance(layer, nn.Linear):  # norms come by themselves
                    _draw(layer.weight, layer.in_features, 1.0, generator)
        elif isinstance(module, AfterNext):
            _draw(module.combine.weight, module.combine.in_features, 1.0, generator)
        elif isinstance(module, ClassificationHead | NextByteHead):
            _draw(module.score.weight, module.score.in_features, init.head, generator)
        elif isinstance(module, nn.RMSNorm):
            module.weight.fill_(1.0)
    # After all draws, so that every other layer starts as it would beside random filters.
    if isinstance(network.encoder, ImageConvEncoder) and network.encoder.config.filters == "oriented":
        _orient(network.encoder.convolutions[0].get_parameter("weight"), init.conv)


def _draw(weight: Tensor, fan_in: int, gain: float, generator: torch.Generator) -> None:
    weight.normal_(0.0, 1.0, generator=generator).mul_(gain / math.sqrt(fan_in))


def _orient(weight_OCKK: Tensor, gain: float) -> None:
    """Give every input channel the same filter; over all of them, a filter has the norm ``gain``."""
    filters, channels, side, _ = weight_OCKK.shape
    weight_OCKK.copy_((oriented_filters(filters, side) * (gain / math.sqrt(channels))).unsqueeze(1))


def _draw_router(router: Router, gain: float, generator: torch.Generator) -> None:
    for layer in router.modules():
        if isinstance(layer, nn.Linear):
            _draw(layer.weight, layer.in_features, gain, generator)
    if router.selection_bias is not None:
        router.selection_bias.zero_()


def _draw_experts(weight_EIO: Tensor, gain: float, generator: torch.Generator, *, copies: bool) -> None:
    _draw(weight_EIO, weight_EIO.shape[1], gain, generator)
    if copies:
        weight_EIO.copy_(weight_EIO[:1].expand_as(weight_EIO).clone())
