"""Per-example gradients and norms of our layers, registered with Opacus.

Opacus's own samplers take the leading axis of a layer's input for the example axis. After dispatch it counts
rows, so they would scale, or silently misattribute, the gradients of routed experts. The grouped layer gets
the row → example map with its rows, and the samplers below use nothing else to attribute a row.

An example without a row at an expert gets exact zeros there.
"""

from __future__ import annotations

from opacus.grad_sample import register_grad_sampler, register_norm_sampler
from torch import Tensor, nn

from conclave.model.encoders.tokens import PositionTable
from conclave.model.experts.stacked import GroupedLinear
from conclave.model.layers.elementwise import Scale
from conclave.privacy.bookkeeping.contributions import Experts
from conclave.privacy.bookkeeping.layers import scaled
from conclave.privacy.bookkeeping.ragged import Segments


def _experts(activations: list[Tensor], backprops: Tensor) -> Experts:
    rows_NI, offsets_E, example_N, example_B = activations
    return Experts(rows_NI.to(backprops.dtype), backprops, Segments(offsets_E, example_N, len(example_B)))


def grouped_linear_gradients(
    layer: GroupedLinear, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Return the gradient of every example, shape [B, E, I, O]."""
    return {layer.weight: _experts(activations, backprops).per_unit()}


def grouped_linear_norms(
    layer: GroupedLinear, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Return the L2 norm of every example's gradient over all experts, shape [B].

    Computed from the product itself, not from Gram matrices, whose differences cancel in fp32.
    """
    square_B = backprops.new_zeros(len(activations[3]))
    for unit_S, _, product_SIO in _experts(activations, backprops).products():
        square_B.index_add_(0, unit_S, product_SIO.square().sum(dim=(1, 2)))
    return {layer.weight: square_B.sqrt()}


def position_table_gradients(
    layer: PositionTable, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Return the gradient of every example, shape [B, T, D]: its own output gradient."""
    return {layer.weight: backprops}


def scale_gradients(layer: Scale, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Return the gradient of every example, shape [B, *shape]."""
    return {layer.weight: scaled(layer.weight.shape, activations[0], backprops)}


register_grad_sampler(GroupedLinear)(grouped_linear_gradients)
register_norm_sampler(GroupedLinear)(grouped_linear_norms)
register_grad_sampler(PositionTable)(position_table_gradients)
register_grad_sampler(Scale)(scale_gradients)
