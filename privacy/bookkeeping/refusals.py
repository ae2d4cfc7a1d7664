"""Models that cannot be made private as they are, refused by name, each with what to use instead.

All of it can be seen in the module alone, without records: :func:`check` can run before anything is charged.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from opacus.grad_sample import GradSampleHooks
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from conclave.base.errors import BadInputError
from conclave.privacy.bookkeeping.layers import own_parameters, wanted

Refusal = tuple[Callable[[nn.Module], bool], str]


def _is_trained(module: nn.Module) -> bool:
    return any(wanted(p) for p in module.parameters())


def _has_hook(module: nn.Module, kinds: type | tuple[type, ...]) -> bool:
    return any(isinstance(hook, kinds) for hook in module._forward_pre_hooks.values())


_REFUSED: list[Refusal] = [
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
        "draws from one stream for all examples, so that one more changes the rest; use "
        "conclave.model.layers.unit_random.UnitDropout",
    ),
    (
        lambda m: isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.scale_grad_by_freq,
        "scales by frequency in the batch; use scale_grad_by_freq=False",
    ),
    (
        lambda m: isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.max_norm is not None,
        "changes its weights in the forward pass; use max_norm=None",
    ),
    (
        lambda m: isinstance(m, nn.EmbeddingBag) and m.mode == "max" and _is_trained(m),
        "takes the largest of each value, which cannot be told by example; use mode='sum' or 'mean'",
    ),
    (
        lambda m: isinstance(m, nn.RNNBase),
        "has no batch-first gradients; use opacus.layers.DPLSTM, DPGRU or DPRNN",
    ),
    (
        lambda m: isinstance(m, nn.LSTMCell) and _is_trained(m),
        "cannot be run example by example; use opacus.layers.dp_rnn.DPLSTMCell",
    ),
    (
        lambda m: isinstance(m, nn.MultiheadAttention),
        "holds weights of its own beside layers; use "
        "conclave.model.attention.multi_head.MultiHeadAttention or four nn.Linear",
    ),
    (
        lambda m: isinstance(m, nn.ParameterList | nn.ParameterDict) and _is_trained(m),
        "holds weights that no layer's forward pass uses; give each a layer of its own with nn.ModuleList",
    ),
    (
        lambda m: _has_hook(m, (WeightNorm, SpectralNorm)) and _is_trained(m),
        "computes its weight before its forward pass (weight_norm, spectral_norm), where gradients cannot be told by "
        "unit; use torch.nn.utils.remove_weight_norm or remove_spectral_norm, or a layer that computes it in forward",
    ),
    (
        lambda m: _has_hook(m, BasePruningMethod) and _is_trained(m),
        "computes its weight before its forward pass (pruning); use torch.nn.utils.prune.remove",
    ),
    (
        lambda m: is_parametrized(m) and _is_trained(m),
        "computes its weight from other parameters (torch.nn.utils.parametrize), where gradients cannot be told by "
        "unit; use torch.nn.utils.parametrize.remove_parametrizations, or a layer that computes it in forward",
    ),
    (
        lambda m: any(p is not None and p.is_complex() and p.requires_grad for p in m._parameters.values()),
        "has complex parameters, whose gradients are not told; hold real and imaginary parts (torch.view_as_complex)",
    ),
    (
        lambda m: any(isinstance(p, UninitializedParameter) for p in m._parameters.values()),
        "has parameters without a shape; run it once on an example first",
    ),
    (
        lambda m: isinstance(m, DataParallel | DistributedDataParallel),
        "spreads a batch over copies of the model; use the module inside it",
    ),
    (
        lambda m: isinstance(m, torch.jit.ScriptModule) and _is_trained(m),
        "is compiled, so that its layers cannot be watched; use the Python module",
    ),
    (
        lambda m: type(m).__name__ == "OptimizedModule" or getattr(m, "_compiled_call_impl", None) is not None,
        "is compiled, so that its layers cannot be watched; use the module before torch.compile",
    ),
]

_HOOKED = "has hooks of its own on its output, which Opacus does not see through"
_NOT_BY_OPACUS: list[Refusal] = [
    (lambda m: "forward" in vars(m), "has another forward pass than its class"),
    (lambda m: type(m) not in GradSampleHooks.GRAD_SAMPLERS, "has no sampler among Opacus's"),
    (lambda m: isinstance(m, _ConvNd) and m.padding_mode != "zeros", "pads with other values than zeros"),
    (lambda m: isinstance(m, nn.Embedding) and m.padding_idx is not None, "leaves out padding_idx"),
    (lambda m: isinstance(m, nn.EmbeddingBag), "looks up several ids at once"),
    (lambda m: isinstance(m, nn.LayerNorm) and m.bias is None, "has no bias"),
    (lambda m: bool(m._forward_hooks or m._backward_hooks or m._backward_pre_hooks), _HOOKED),
]
"""Layers that Opacus's samplers are wrong about, or that they do not know."""


def check(module: nn.Module, gradients: str = "bookkeeping") -> None:
    """Refuse a module that holds a layer whose examples are not independent, or that has no gradients per unit.

    What a module computes in its own ``forward`` cannot be seen here: :mod:`conclave.privacy.training.accounted` looks
    whether every gradient is accounted for, ``conclave audit model`` whether examples are independent.

    Args:
        gradients: the mode, see :mod:`conclave.privacy.gradients.modes`; Opacus's samplers, of ``hooks`` and ``ghost``,
            know fewer layers.

    Raises:
        BadInputError: names the layer and what to use instead.
    """
    for name, layer in module.named_modules():
        named = f"layer {name or '(the model)'} ({type(layer).__name__})"
        for is_refused, reason in _REFUSED:
            if is_refused(layer):
                raise BadInputError(f"{named} {reason}")
        own = own_parameters(layer)
        if own and any(wanted(p) for child in layer.children() for p in child.parameters()):
            raise BadInputError(
                f"parameter {'.'.join(filter(None, (name, next(iter(own)))))} belongs to a module that holds layers "
                "too; give it a layer of its own, as conclave.model.layers.elementwise.Scale or "
                "conclave.model.encoders.tokens.PositionTable"
            )
        if own and gradients in ("hooks", "ghost"):
            for is_refused, reason in _NOT_BY_OPACUS:
                if is_refused(layer):
                    raise BadInputError(f"{named} {reason}; use gradients = 'bookkeeping'")
