"""What each kind of layer contributes: from its input and output gradient to per-unit gradients of its parameters.

Register a rule for a layer of your own with :func:`register`. A layer without a rule falls back to Opacus's per-sample
hooks (its registry, or ``torch.func``), which materialise every unit's gradient.

Dimension suffixes: B examples, T tokens, C channels, D and O widths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient
from torch import Tensor, nn

from model.elementwise import Scale
from model.encoders import PositionTable
from model.errors import BadInputError
from model.experts import GroupedLinear
from privacy.bookkeeping.contributions import Contribution, Experts, Lookup, Matrix, PerUnit
from privacy.bookkeeping.factor import Factor
from privacy.bookkeeping.kept import Kept
from privacy.bookkeeping.ragged import Segments
from privacy.bookkeeping.units import Units


class Pass(Protocol):
    """What a rule may ask of the current forward and backward pass."""

    units: Units

    def segments(self, offsets_E: Tensor, example_N: Tensor) -> Segments:
        """Return the segments of a dispatch; layers that share the dispatch share the answer."""


Contributions = Iterator[tuple[Tensor, Contribution]]
Rule = Callable[[Any, Sequence[Kept], Tensor, Pass], Contributions]
"""(layer, its inputs, output gradient, pass) → contributions of its parameters. Tensors are float32 or wider."""

_RULES: dict[type[nn.Module], Rule] = {}
rules_by_row: set[Rule] = set()
"""Rules of layers that see rows together with their map to examples; for all others the first axis is the batch."""


def register(*kinds: type[nn.Module], by_row: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for exactly these layer classes; a subclass may compute something else."""

    def decorate(rule: Rule) -> Rule:
        if by_row:
            rules_by_row.add(rule)
        for kind in kinds:
            _RULES[kind] = rule
        return rule

    return decorate


def rule_for(layer: nn.Module) -> Rule | None:
    """Return the rule of a layer, None where it has none and the fallback serves."""
    return _RULES.get(type(layer))


def wanted(parameter: Tensor | None) -> bool:
    """Whether a parameter is there and trained."""
    return parameter is not None and parameter.requires_grad


@register(nn.Linear)
def linear(layer: nn.Linear, inputs: Sequence[Kept], delta: Tensor, step: Pass) -> Contributions:
    """X [B, …, D] → [B, …, O]."""
    left = Factor(step.units.rows(delta))
    if wanted(layer.weight):
        yield layer.weight, Matrix(left, inputs[0].factor, layer.weight.shape)
    if wanted(layer.bias):
        yield layer.bias, PerUnit(left.rows_ULD.sum(1))


@register(nn.Embedding)
def embedding(layer: nn.Embedding, inputs: Sequence[Kept], delta: Tensor, step: Pass) -> Contributions:
    """Ids [B, …] → [B, …, D]."""
    if layer.padding_idx is not None:
        delta = delta.masked_fill((inputs[0].value == layer.padding_idx).unsqueeze(-1), 0.0)
    id_UL = step.units.rows(inputs[0].value.unsqueeze(-1)).squeeze(-1)
    yield layer.weight, Lookup(id_UL, step.units.rows(delta), layer.num_embeddings)


@register(nn.RMSNorm, nn.LayerNorm)
def token_norm(layer: nn.RMSNorm | nn.LayerNorm, inputs: Sequence[Kept], delta: Tensor, step: Pass) -> Contributions:
    """Normalised over the last axes: the gain's gradient is Σ_t δ_t ∘ x̂_t."""
    shape = list(layer.normalized_shape)
    if isinstance(layer, nn.RMSNorm):
        normal = _over_root_mean_square(inputs[0].value, len(shape), layer.eps)
    else:
        normal = F.layer_norm(inputs[0].value, shape, eps=layer.eps)
    if wanted(layer.weight):
        yield layer.weight, PerUnit(_over_tokens(delta * normal, shape, step.units))
    bias: Tensor | None = getattr(layer, "bias", None)
    if bias is not None and wanted(bias):
        yield bias, PerUnit(_over_tokens(delta, shape, step.units))


def _over_root_mean_square(x: Tensor, axes: int, eps: float | None) -> Tensor:
    """What ``F.rms_norm`` computes, which is slower on the CPU."""
    mean = x.square().mean(dim=list(range(-axes, 0)), keepdim=True)
    return x * (mean + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()


def _over_tokens(x: Tensor, shape: list[int], units: Units) -> Tensor:
    """Add up all axes between the example and the normalised ones, then a unit's examples: [U, *shape]."""
    per_example = x.reshape(len(x), -1, math.prod(shape)).sum(1)
    return units.add_up(per_example).view(-1, *shape)


@register(nn.GroupNorm)
def group_norm(layer: nn.GroupNorm, inputs: Sequence[Kept], delta: Tensor, step: Pass) -> Contributions:
    """X [B, C, …], normalised within an example."""
    normal = F.group_norm(inputs[0].value, layer.num_groups, eps=layer.eps)
    if wanted(layer.weight):
        yield layer.weight, PerUnit(step.units.add_up((delta * normal).flatten(2).sum(2)))
    if wanted(layer.bias):
        yield layer.bias, PerUnit(step.units.add_up(delta.flatten(2).sum(2)))


@register(nn.Conv1d, nn.Conv2d)
def convolution(layer: nn.Conv1d | nn.Conv2d, inputs: Sequence[Kept], delta: Tensor, step: Pass) -> Contributions:
    """A dense layer on patches; unfolded, never a fast convolution, whose rounding has no such bound."""
    x_BCHW, delta_BOHW = inputs[0].value, delta
    if isinstance(layer, nn.Conv1d):
        x_BCHW, delta_BOHW = x_BCHW.unsqueeze(2), delta_BOHW.unsqueeze(2)
    if wanted(layer.weight):
        patch_BPT = _patches(layer, x_BCHW)
        delta_BOT = delta_BOHW.flatten(2)
        if layer.groups == 1:
            left = Factor(step.units.rows(delta_BOT.transpose(1, 2)))
            right = Factor(step.units.rows(patch_BPT.transpose(1, 2)))
            yield layer.weight, Matrix(left, right, layer.weight.shape)
        else:
            patch_BGPT = patch_BPT.unflatten(1, (layer.groups, -1))
            delta_BGOT = delta_BOT.unflatten(1, (layer.groups, -1))
            gradient_BGOP = delta_BGOT @ patch_BGPT.transpose(2, 3)
            yield layer.weight, PerUnit(step.units.add_up(gradient_BGOP.reshape(-1, *layer.weight.shape)))
    if layer.bias is not None and wanted(layer.bias):
        yield layer.bias, PerUnit(step.units.add_up(delta_BOHW.flatten(2).sum(2)))


def _patches(layer: nn.Conv1d | nn.Conv2d, x_BCHW: Tensor) -> Tensor:
    """Return [B, C·kernel, positions]; all padding is done here, whatever its mode."""

    def pair(sizes: tuple[int, ...], default: int) -> tuple[int, int]:
        return (default, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])

    if any(layer._reversed_padding_repeated_twice):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padding = layer._reversed_padding_repeated_twice
        if isinstance(layer, nn.Conv1d):  # padding of the last axis only works without the axis put in
            x_BCHW = F.pad(x_BCHW.squeeze(2), padding, mode=mode).unsqueeze(2)
        else:
            x_BCHW = F.pad(x_BCHW, padding, mode=mode)
    return F.unfold(x_BCHW, pair(layer.kernel_size, 1), dilation=pair(layer.dilation, 1), stride=pair(layer.stride, 1))


@register(GroupedLinear, by_row=True)
def grouped_linear(layer: GroupedLinear, inputs: Sequence[Kept], delta: Tensor, step: Pass) -> Contributions:
    """Rows [N, D] sorted by expert, with their map to examples."""
    rows_ND, offsets_E, example_N, _ = (kept.value for kept in inputs)
    yield layer.weight, Experts(rows_ND, delta, step.segments(offsets_E, example_N))


@register(PositionTable)
def position_table(layer: PositionTable, inputs: Sequence[Kept], delta: Tensor, step: Pass) -> Contributions:
    """X + w: the gradient is the output gradient."""
    yield layer.weight, PerUnit(step.units.add_up(delta))


@register(Scale)
def scale(layer: Scale, inputs: Sequence[Kept], delta: Tensor, step: Pass) -> Contributions:
    """X · w, with w broadcast: δ ∘ x summed over what was broadcast."""
    product = delta * inputs[0].value
    per_example = product.flatten(1).sum(1) if layer.weight.dim() == 0 else _to_shape(product, layer.weight.shape)
    yield layer.weight, PerUnit(step.units.add_up(per_example))


def _to_shape(product: Tensor, shape: torch.Size) -> Tensor:
    """Sum [B, …, *broadcast] down to [B, *shape]."""
    lead = product.dim() - 1 - len(shape)
    if lead:
        product = product.flatten(1, lead).sum(1)
    for axis, size in enumerate(shape, start=1):
        if size == 1 and product.shape[axis] != 1:
            product = product.sum(axis, keepdim=True)
    return product


def fallback(layer: nn.Module, inputs: Sequence[Kept], delta: Tensor, step: Pass) -> Contributions:
    """Materialise with Opacus: the sampler registered for the layer's class, or ``torch.func`` on its forward."""
    sampler = GradSampleModule.GRAD_SAMPLERS.get(type(layer), ft_compute_per_sample_gradient)
    with torch.enable_grad():
        gradients: Mapping[Tensor, Tensor] = sampler(layer, [kept.value for kept in inputs], delta)
    for parameter, gradient_B in gradients.items():
        if wanted(parameter):
            if len(gradient_B) != step.units.examples:
                raise BadInputError(f"a {type(layer).__name__} does not keep the batch as its first axis")
            yield parameter, PerUnit(step.units.add_up(gradient_B.detach()))
