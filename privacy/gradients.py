"""Per-example gradients and norms of our layers, registered with Opacus.

Opacus's own samplers take the leading axis of a layer's input for the example axis. After dispatch it counts
rows, so they would scale, or silently misattribute, the gradients of routed experts. The grouped layer gets
the row → example map with its rows, and the samplers below use nothing else to attribute a row.

An example without a row at an expert gets exact zeros there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from opacus.grad_sample import register_grad_sampler, register_norm_sampler
from torch import Tensor, nn

from model.encoders import PositionTable
from model.experts import GroupedLinear


class Segments(NamedTuple):
    """Rows grouped by (expert, example): S groups, padded to the longest, L rows.

    x_SLI, delta_SLO: inputs and output gradients, zero where padded. expert_S, example_S: int64.
    """

    x_SLI: Tensor
    delta_SLO: Tensor
    expert_S: Tensor
    example_S: Tensor


def segment(rows_NI: Tensor, delta_NO: Tensor, offsets_E: Tensor, example_N: Tensor) -> Segments:
    """Group dispatched rows by the (expert, example) pair that they belong to."""
    rows = torch.arange(len(rows_NI), device=rows_NI.device)
    expert_N = torch.searchsorted(offsets_E.long(), rows, right=True)
    # One number for a pair, in the order of pairs: finding distinct numbers is many times faster than distinct rows.
    examples = int(example_N.max()) + 1 if len(example_N) else 1
    pair_S, group_N, length_S = torch.unique(expert_N * examples + example_N, return_inverse=True, return_counts=True)
    order_N = torch.argsort(group_N, stable=True)
    start_S = length_S.cumsum(0) - length_S
    slot_N = torch.empty_like(order_N)
    slot_N[order_N] = rows - start_S[group_N[order_N]]
    longest = int(length_S.max()) if len(length_S) else 0
    x_SLI = rows_NI.new_zeros(len(pair_S), longest, rows_NI.shape[1])
    delta_SLO = delta_NO.new_zeros(len(pair_S), longest, delta_NO.shape[1])
    x_SLI[group_N, slot_N] = rows_NI
    delta_SLO[group_N, slot_N] = delta_NO
    return Segments(x_SLI, delta_SLO, pair_S // examples, pair_S % examples)


def _segments(activations: list[Tensor], backprops: Tensor) -> tuple[Segments, int]:
    rows_NI, offsets_E, example_N, example_B = activations
    return segment(rows_NI.to(backprops.dtype), backprops, offsets_E, example_N), len(example_B)


def grouped_linear_gradients(
    layer: GroupedLinear, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Return the gradient of every example, shape [B, E, I, O]."""
    seg, batch = _segments(activations, backprops)
    gradient_BEIO = backprops.new_zeros(batch, *layer.weight.shape)
    gradient_BEIO[seg.example_S, seg.expert_S] = seg.x_SLI.transpose(1, 2) @ seg.delta_SLO
    return {layer.weight: gradient_BEIO}


def grouped_linear_norms(
    layer: GroupedLinear, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Return the L2 norm of every example's gradient over all experts, shape [B].

    Computed from the product itself, not from Gram matrices, whose differences cancel in fp32.
    """
    seg, batch = _segments(activations, backprops)
    square_S = (seg.x_SLI.transpose(1, 2) @ seg.delta_SLO).square().sum(dim=(1, 2))
    square_B = square_S.new_zeros(batch).index_add(0, seg.example_S, square_S)
    return {layer.weight: square_B.sqrt()}


def position_table_gradients(
    layer: PositionTable, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Return the gradient of every example, shape [B, T, D]: its own output gradient."""
    return {layer.weight: backprops}


register_grad_sampler(GroupedLinear)(grouped_linear_gradients)
register_norm_sampler(GroupedLinear)(grouped_linear_norms)
register_grad_sampler(PositionTable)(position_table_gradients)
