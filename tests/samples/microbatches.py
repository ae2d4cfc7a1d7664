"""The truth that per-unit gradients are held against: each unit run alone through plain autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def alone(module: nn.Module, loss: Callable[[dict[str, Tensor]], Tensor], batch, unit_B: Tensor):
    """Parameter → gradient of every unit's mean loss, [U, *shape]."""
    found = {p: [] for p in module.parameters() if p.requires_grad}
    for unit in range(int(unit_B.max()) + 1):
        mine = {name: tensor[unit_B == unit] for name, tensor in batch.items()}
        gradients = torch.autograd.grad(loss(mine).mean(), list(found), allow_unused=True)
        for (p, rows), gradient in zip(found.items(), gradients, strict=True):
            rows.append(torch.zeros_like(p) if gradient is None else gradient.detach().to_dense())
    return {p: torch.stack(rows) for p, rows in found.items()}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12))
