"""Routed experts: stacked weights, computed on rows sorted by (expert, example).

Dimension suffixes: N rows after dispatch, E experts held, D width, H expert hidden width, B examples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ExpertsConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "tanh": torch.tanh}


class GroupedLinear(nn.Module):
    """``E`` bias-free linear maps, map ``e`` applied to the rows of group ``e``.

    The layer is given the row → example map together with its rows: after dispatch the leading axis
    counts rows, not examples, so nothing else could attribute a row's gradient to the right example.

    Args of ``forward``:
        rows_NI: input rows, float, sorted by (expert, example).
        offsets_E: int32, exclusive end of each expert's rows; the last one must equal N (rows past it
            would be uninitialised memory).
        example_N: int64, example index of each row, in ``[0, B)``.
        example_B: int64, the B example indices. Only its length is used: examples without a row exist too.

    Returns:
        rows_NO of the same dtype.
    """

    def __init__(self, experts: int, in_width: int, out_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, in_width, out_width))

    def forward(self, rows_NI: Tensor, offsets_E: Tensor, example_N: Tensor, example_B: Tensor) -> Tensor:
        """Multiply every row by its expert's matrix; see the class for shapes."""
        if rows_NI.dtype == torch.float64:  # grouped_mm refuses float64, which gradcheck needs
            rows_NO = grouped_matmul_loop(rows_NI, self.weight, offsets_E)
        else:
            rows_NO = F.grouped_mm(rows_NI, self.weight, offs=offsets_E)
        if rows_NO.requires_grad:  # grouped_mm's backward raises on an expanded (stride-0) gradient
            rows_NO.register_hook(lambda grad: grad if grad is None else grad.contiguous())
        return rows_NO


def grouped_matmul_loop(rows_NI: Tensor, weight_EIO: Tensor, offsets_E: Tensor) -> Tensor:
    """What ``grouped_mm`` computes, one expert at a time: the float64 path and the tests' reference."""
    ends = offsets_E.tolist()
    starts = [0, *ends[:-1]]
    return torch.cat([rows_NI[s:e] @ weight_EIO[i] for i, (s, e) in enumerate(zip(starts, ends, strict=True))])


class RoutedExperts(nn.Module):
    """``E`` two-layer feed-forward networks D → H → D, evaluated together on dispatched rows."""

    def __init__(self, config: ExpertsConfig, held: int, width: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.up = GroupedLinear(held, width, config.hidden)
        self.down = GroupedLinear(held, config.hidden, width)

    def forward(self, rows_ND: Tensor, offsets_E: Tensor, example_N: Tensor, example_B: Tensor) -> Tensor:
        """Apply each row's expert; arguments as for :class:`GroupedLinear`, returns rows_ND."""
        rows_NH = self.activation(self.up(rows_ND, offsets_E, example_N, example_B))
        rows: Tensor = self.down(rows_NH, offsets_E, example_N, example_B)
        return rows


class SharedExpert(nn.Module):
    """A feed-forward network that every token passes, as wide as ``shared`` routed experts together."""

    def __init__(self, config: ExpertsConfig, width: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.up = nn.Linear(width, config.shared * config.hidden, bias=False)
        self.down = nn.Linear(config.shared * config.hidden, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the expert's output, same shape as the input."""
        y_BTD: Tensor = self.down(self.activation(self.up(x_BTD)))
        return y_BTD
