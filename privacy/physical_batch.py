"""How many examples fit in memory at once: from shapes, so it tells nothing about the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

MOST = 512
_GRADIENTS_BESIDE_ACTIVATIONS = 3  # kept inputs, their gradients, and what norms are taken from


def fitting(
    loss: Callable[[Mapping[str, Tensor]], Tensor],
    batch: Mapping[str, Tensor],
    module: nn.Module,
    memory_bytes: int,
    *,
    per_sample_gradients: bool,
) -> int:
    """Return how many examples to process at once, from 1 to 512.

    Runs one example forward and counts what autograd saves for it.

    Args:
        per_sample_gradients: whether the mode also holds a gradient of the whole model for every example.
    """
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    seen: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(count, lambda tensor: tensor):
        # A copy: of a view, the whole data set's storage would be counted.
        loss({name: tensor[:1].clone() for name, tensor in batch.items()})
    example = _GRADIENTS_BESIDE_ACTIVATIONS * sum(seen.values())
    if per_sample_gradients:
        example += 2 * sum(p.numel() * 4 for p in module.parameters() if p.requires_grad)
    return max(1, min(MOST, memory_bytes // max(example, 1)))
