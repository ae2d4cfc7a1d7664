"""Random layers whose draws belong to one example: adding another example changes nothing for the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

Draw = Callable[[int, int], Tensor]
"""(examples, values per example) → uniforms in (0, 1), [examples, values]; row i is the i-th example's own."""

_draw: ContextVar[Draw | None] = ContextVar("draw", default=None)


@contextmanager
def drawing_from(draw: Draw) -> Iterator[None]:
    """Let random layers draw from ``draw`` while the context lasts."""
    token = _draw.set(draw)
    try:
        yield
    finally:
        _draw.reset(token)


def unit_uniform(x: Tensor) -> Tensor:
    """Return uniforms for every value of ``x`` [B, …], on the CPU, [B, values per example]; row b is example b's own.

    Outside private training they come from torch's generator, which can return 0.
    """
    draw, examples, values = _draw.get(), len(x), math.prod(x.shape[1:])
    return torch.rand(examples, values) if draw is None else draw(examples, values)


class UnitDropout(nn.Module):
    """Dropout with a stream per example; the first axis is the example.

    In private training the draws are a pseudo-random function of the node's secret, the step and the example. Outside
    of it, torch's generator is used.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"p is {p}, must be in [0, 1)")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Zero each value with probability p in training and scale the others by 1/(1 − p)."""
        if not self.training or self.p == 0.0:
            return x
        keep = (unit_uniform(x) >= self.p).to(device=x.device, dtype=x.dtype).view_as(x)
        return x * keep / (1.0 - self.p)
