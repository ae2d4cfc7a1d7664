"""What each kind of layer contributes: from its input and output gradient to per-unit gradients of its parameters.

Register a rule for a layer of your own with :func:`register`. A layer without a rule is run with parameters of each
example's own (:mod:`conclave.privacy.bookkeeping.expanded`), which materialises every unit's gradient.

Dimension suffixes: B examples, T tokens, C channels, D and O widths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from opacus.layers.dp_rnn import RNNLinear
from torch import Tensor, nn

from conclave.base.errors import BadInputError
from conclave.model.encoders.tokens import PositionTable
from conclave.model.experts.stacked import GroupedLinear
from conclave.model.layers.elementwise import Scale
from conclave.privacy.bookkeeping.contributions import Contribution, Experts, Lookup, Matrix, PerUnit
from conclave.privacy.bookkeeping.ragged import Segments
from conclave.privacy.bookkeeping.shared import Factor, Kept
from conclave.privacy.bookkeeping.units import Units


class Passing(Protocol):
    """What a rule may ask of the current forward and backward pass."""

    units: Units

    def segments(self, offsets_E: Tensor, example_N: Tensor) -> Segments:
        """Return the segments of a dispatch; layers that share the dispatch share the answer."""


Contributions = Iterator[tuple[Tensor, Contribution]]
Rule = Callable[[Any, Sequence[Kept], Tensor, Passing], Contributions]
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
    """Return the rule of a layer; None if it has none, also because its forward pass is not that of its class."""
    return None if "forward" in vars(layer) else _RULES.get(type(layer))


def wanted(parameter: Tensor | None) -> bool:
    """Whether a parameter is there and trained."""
    return parameter is not None and parameter.requires_grad


def own_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Return a layer's own trained parameters by name.

    A parameter that an inner module also holds belongs to that module: Opacus's recurrent layers rename their cells'.
    """
    inside = {id(p) for child in layer.children() for p in child.parameters()}
    return {key: p for key, p in layer._parameters.items() if p is not None and p.requires_grad and id(p) not in inside}


@register(nn.Linear, RNNLinear)
def linear(layer: nn.Linear, inputs: Sequence[Kept], delta: Tensor, step: Passing) -> Contributions:
    """X [B, …, D] → [B, …, O]."""
    left = Factor(step.units.rows(delta))
    if wanted(layer.weight):
        yield layer.weight, Matrix(left, inputs[0].factor, layer.weight.shape)
    if wanted(layer.bias):
        yield layer.bias, PerUnit(left.rows_ULD.sum(1))


@register(nn.Embedding)
def embedding(layer: nn.Embedding, inputs: Sequence[Kept], delta: Tensor, step: Passing) -> Contributions:
    """Ids [B, …] → [B, …, D]."""
    if layer.padding_idx is not None:
        delta = delta.masked_fill((inputs[0].value == layer.padding_idx).unsqueeze(-1), 0.0)
    id_UL = step.units.rows(inputs[0].value.unsqueeze(-1)).squeeze(-1)
    yield layer.weight, Lookup(id_UL, step.units.rows(delta), layer.num_embeddings)


@register(nn.EmbeddingBag, by_row=True)
def embedding_bag(layer: nn.EmbeddingBag, inputs: Sequence[Kept], delta: Tensor, step: Passing) -> Contributions:
    """Ids [B, L], or all in one with the offset of each example; sums or means, with weights of ids where given."""
    id_BL, coefficient_BL = _bags(layer, [kept.value for kept in inputs], step.units.examples)
    if layer.padding_idx is not None:
        coefficient_BL = coefficient_BL.masked_fill(id_BL == layer.padding_idx, 0.0)
    if layer.mode == "mean":
        coefficient_BL = coefficient_BL / coefficient_BL.sum(1, keepdim=True).clamp(min=1.0)
    delta_BLD = coefficient_BL.to(delta.dtype).unsqueeze(2) * delta.unsqueeze(1)
    id_UL = step.units.rows(id_BL.unsqueeze(-1)).squeeze(-1)
    yield layer.weight, Lookup(id_UL, step.units.rows(delta_BLD), layer.num_embeddings)


def _bags(layer: nn.EmbeddingBag, inputs: Sequence[Tensor], examples: int) -> tuple[Tensor, Tensor]:
    """Return the ids of each example and their weights, [B, L]; a place without an id has weight 0."""
    ids, rest = inputs[0].long(), list(inputs[1:])
    if ids.dim() == 1:
        start_B = rest.pop(0).long()
        end_B = torch.cat([start_B[1:], start_B.new_full((1,), len(ids))])
        if layer.include_last_offset:
            start_B, end_B = start_B[:-1], start_B[1:]
        size_B = end_B - start_B
        place_L = torch.arange(int(size_B.max()) if len(ids) else 1, device=ids.device)
        there_BL = place_L < size_B[:, None]
        place_BL = torch.where(there_BL, start_B[:, None] + place_L, 0)
    else:
        there_BL = torch.ones_like(ids, dtype=torch.bool)
        place_BL = torch.arange(ids.numel(), device=ids.device).view_as(ids)
    if len(there_BL) != examples:
        raise BadInputError(f"an EmbeddingBag saw {len(there_BL)} bags of {examples} examples, must be one bag each")
    if not ids.numel():
        return torch.zeros(examples, 1, dtype=torch.long, device=ids.device), torch.zeros(
            examples, 1, device=ids.device
        )
    weight_BL = there_BL.float()
    if rest:
        weight_BL = torch.where(there_BL, rest[0].flatten()[place_BL], 0.0)
    return torch.where(there_BL, ids.flatten()[place_BL], 0), weight_BL


@register(nn.RMSNorm, nn.LayerNorm)
def token_norm(layer: nn.RMSNorm | nn.LayerNorm, inputs: Sequence[Kept], delta: Tensor, step: Passing) -> Contributions:
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
def group_norm(layer: nn.GroupNorm, inputs: Sequence[Kept], delta: Tensor, step: Passing) -> Contributions:
    """X [B, C] or [B, C, …], normalised within an example."""
    normal, delta = F.group_norm(inputs[0].value, layer.num_groups, eps=layer.eps).unsqueeze(-1), delta.unsqueeze(-1)
    if wanted(layer.weight):
        yield layer.weight, PerUnit(step.units.add_up((delta * normal).flatten(2).sum(2)))
    if wanted(layer.bias):
        yield layer.bias, PerUnit(step.units.add_up(delta.flatten(2).sum(2)))


@register(nn.Conv1d, nn.Conv2d)
def convolution(layer: nn.Conv1d | nn.Conv2d, inputs: Sequence[Kept], delta: Tensor, step: Passing) -> Contributions:
    """A dense layer on patches: unfolded, never a fast convolution, whose rounding has no such bound."""
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
def grouped_linear(layer: GroupedLinear, inputs: Sequence[Kept], delta: Tensor, step: Passing) -> Contributions:
    """Rows [N, D] sorted by expert, with their map to examples."""
    rows_ND, offsets_E, example_N, _ = (kept.value for kept in inputs)
    yield layer.weight, Experts(rows_ND, delta, step.segments(offsets_E, example_N))


@register(PositionTable)
def position_table(layer: PositionTable, inputs: Sequence[Kept], delta: Tensor, step: Passing) -> Contributions:
    """X + w: the gradient is the output gradient."""
    yield layer.weight, PerUnit(step.units.add_up(delta))


@register(Scale)
def scale(layer: Scale, inputs: Sequence[Kept], delta: Tensor, step: Passing) -> Contributions:
    """X · w, with w broadcast: δ ∘ x summed over what was broadcast."""
    yield layer.weight, PerUnit(step.units.add_up(scaled(layer.weight.shape, inputs[0].value, delta)))


def scaled(shape: torch.Size, x: Tensor, delta: Tensor) -> Tensor:
    """Return δ ∘ x of every example, [B, …, *broadcast], summed down to [B, *shape]."""
    product = delta * x
    if not shape:
        return product.flatten(1).sum(1)
    lead = product.dim() - 1 - len(shape)
    if lead:
        product = product.flatten(1, lead).sum(1)
    for axis, size in enumerate(shape, start=1):
        if size == 1 and product.shape[axis] != 1:
            product = product.sum(axis, keepdim=True)
    return product
