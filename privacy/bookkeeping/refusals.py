"""Layers that cannot be made private as they are, refused by name, each with what to use instead."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from model.errors import BadInputError
from privacy.bookkeeping.layers import wanted

_REFUSED: list[tuple[Callable[[nn.Module], bool], str]] = [
    (
        lambda m: isinstance(m, _InstanceNorm) and m.track_running_stats,
        "keeps running statistics of the data; use track_running_stats=False",
    ),
    (
        lambda m: isinstance(m, _BatchNorm) and not isinstance(m, _InstanceNorm),
        "makes examples depend on each other; use nn.GroupNorm",
    ),
    (
        lambda m: isinstance(m, _DropoutNd | nn.RReLU) and getattr(m, "p", 1.0) > 0.0,
        "draws from one stream for all examples, so that one more changes the rest; use model.unit_random.UnitDropout",
    ),
    (
        lambda m: isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.scale_grad_by_freq,
        "scales by frequency in the batch; use scale_grad_by_freq=False",
    ),
    (
        lambda m: isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.max_norm is not None,
        "changes its weights in the forward pass; use max_norm=None",
    ),
    (lambda m: isinstance(m, nn.RNNBase), "has no batch-first gradients; use opacus.layers.DPLSTM, DPGRU or DPRNN"),
    (
        lambda m: isinstance(m, nn.MultiheadAttention),
        "holds weights of its own beside layers; use model.attention.MultiHeadAttention or four nn.Linear",
    ),
]


def check(module: nn.Module) -> None:
    """Refuse a module that holds a layer whose examples are not independent, or that cannot be told by unit.

    What a module computes in its own ``forward`` cannot be seen here; ``conclave audit model`` looks for it.

    Raises:
        BadInputError: names the layer and what to use instead.
    """
    for name, layer in module.named_modules():
        for is_refused, reason in _REFUSED:
            if is_refused(layer):
                raise BadInputError(f"layer {name or '(the model)'} ({type(layer).__name__}) {reason}")
        own = [key for key, parameter in layer.named_parameters(recurse=False) if wanted(parameter)]
        inner = [key for child in layer.children() for key, p in child.named_parameters() if wanted(p)]
        if own and inner:
            raise BadInputError(
                f"parameter {'.'.join(filter(None, (name, own[0])))} belongs to a module that holds layers too; "
                "give it a layer of its own, as model.elementwise.Scale or model.encoders.PositionTable"
            )
