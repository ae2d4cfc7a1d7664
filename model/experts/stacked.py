"""Routed experts: stacked weights, computed on rows sorted by (expert, example).

Dimension suffixes: N rows after dispatch, E experts held, D width, H expert hidden width, B examples.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conclave.model.experts.config import ExpertsConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "relu": F.relu, "tanh": torch.tanh, "swiglu": F.silu
}  # fmt: skip
"""What is applied to a hidden layer's values; with swiglu, to its gate's."""


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


class HiddenLayer(nn.Module):
    """A map into hidden values and their activation: ``f(up x)``, or gated, ``silu(gate x) · up x``.

    ``linear(in_width, out_width)`` makes the maps; what it makes decides what else ``forward`` takes, and passes on.
    """

    def __init__(self, activation: str, linear: Callable[[int, int], nn.Module], in_width: int, hidden: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.up = linear(in_width, hidden)
        self.gate = linear(in_width, hidden) if activation == "swiglu" else None

    def forward(self, x: Tensor, *where: Tensor) -> Tensor:
        """Return the hidden values."""
        up: Tensor = self.up(x, *where)
        return self.activation(up) if self.gate is None else self.activation(self.gate(x, *where)) * up


class FeedForward(HiddenLayer):
    """D → H → … → H → D with ``depth`` hidden layers.

    The first one's maps are the network's own ``up`` and ``gate``, so that depth 1 is ``up`` and ``down``.
    """

    def __init__(self, config: ExpertsConfig, linear: Callable[[int, int], nn.Module], width: int, hidden: int) -> None:
        super().__init__(config.activation, linear, width, hidden)
        self.between = nn.ModuleList(
            HiddenLayer(config.activation, linear, hidden, hidden) for _ in range(config.depth - 1)
        )
        self.down = linear(hidden, width)

    def forward(self, x: Tensor, *where: Tensor) -> Tensor:
        """Return the network's output, same shape as ``x``."""
        x = super().forward(x, *where)
        for layer in self.between:
            x = layer(x, *where)
        y: Tensor = self.down(x, *where)
        return y

    def weights_into_hidden(self) -> list[nn.Parameter]:
        """Return the weights of every map but ``down``, in order."""
        maps = [m for layer in (self, *self.between) for m in (layer.up, layer.gate)]
        return [m.get_parameter("weight") for m in maps if isinstance(m, nn.Module)]


class RoutedExperts(FeedForward):
    """``E`` networks evaluated together on dispatched rows; arguments of ``forward`` as for :class:`GroupedLinear`."""

    def __init__(self, config: ExpertsConfig, held: int, width: int) -> None:
        super().__init__(config, partial(GroupedLinear, held), width, config.hidden)


class SharedExpert(FeedForward):
    """A network that every token passes, ``shared`` times as wide as a routed expert."""

    def __init__(self, config: ExpertsConfig, width: int) -> None:
        super().__init__(config, partial(nn.Linear, bias=False), width, config.shared * config.hidden)
