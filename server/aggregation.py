"""From nodes' deltas to one pseudo-gradient step, parameter group by parameter group."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clients.protocol import Plan
from model.errors import BadInputError
from model.parameters import owner
from server.config import ServerOptimizerConfig


@dataclass(frozen=True)
class Contribution:
    """A validated reply: wire name → delta, and the weight of the node that sent it (> 0)."""

    node: str
    weight: float
    delta: Mapping[str, Tensor]


def average(contributions: Sequence[Contribution], min_holders: int) -> dict[str, Tensor]:
    """Average each tensor over the nodes that hold it, in float32, weights normalised per tensor.

    Shared weights are averaged over all replies. A router row or expert with fewer than ``min_holders``
    replies is left out of the result: it keeps its value. The result does not depend on the order of replies.
    """
    holders: Counter[str] = Counter()
    weight: Counter[str] = Counter()
    for item in contributions:
        for name in item.delta:
            holders[name] += 1
    kept = {name for name in holders if owner(name).layer is None or holders[name] >= min_holders}
    ordered = sorted(contributions, key=lambda item: item.node)
    for item in ordered:
        for name in item.delta:
            weight[name] += item.weight  # type: ignore[assignment]  # a Counter of floats
    average: dict[str, Tensor] = {}
    for item in ordered:
        for name in item.delta.keys() & kept:
            share = item.weight / weight[name]
            if name in average:
                average[name].add_(item.delta[name], alpha=share)
            else:
                average[name] = item.delta[name] * share
    return {name: average[name] for name in sorted(average)}


def norm_bound(plan: Plan, parameters: int, declared_size: int) -> float:
    """Return the largest plausible L2 norm of an honest delta; infinite without privacy.

    ``3·lr·steps·(C + σC√d/(q·size))``: the clipped gradient and the noise on d parameters. Noise is by far
    the larger part, so the bound must allow for it.
    """
    if plan.noise_multiplier is None:
        return math.inf
    clip, rate = plan.privacy.clip, plan.privacy.sampling_rate
    noise = plan.noise_multiplier * clip * math.sqrt(parameters) / (rate * declared_size)
    return 3.0 * plan.training.learning_rate * plan.training.steps * (clip + noise)


class ServerOptimizer:
    """Applies averaged deltas to the global tensors with a ``torch.optim`` optimizer, state kept per tensor."""

    def __init__(self, config: ServerOptimizerConfig, tensors: Mapping[str, Tensor]) -> None:
        """Wrap the global ``tensors`` (float32), which :meth:`step` changes in place."""
        self.tensors = {name: torch.nn.Parameter(tensors[name].clone()) for name in sorted(tensors)}
        self._optimizer = torch.optim.SGD(self.tensors.values(), lr=config.learning_rate, momentum=config.momentum)

    def step(self, averaged: Mapping[str, Tensor], learning_rate: float) -> None:
        """Take one step; tensors not in ``averaged`` keep value and optimizer state."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        for name, parameter in self.tensors.items():
            parameter.grad = -averaged[name] if name in averaged else None
        self._optimizer.step()
        self._optimizer.zero_grad()

    def snapshot(self) -> dict[str, Tensor]:
        """Return the global tensors, detached; they share memory with the optimizer's."""
        return {name: parameter.detach() for name, parameter in self.tensors.items()}

    def momentum(self) -> dict[str, Tensor]:
        """Return the momentum buffers that exist, by tensor name."""
        buffers = {}
        for name, parameter in self.tensors.items():
            buffer = self._optimizer.state[parameter].get("momentum_buffer")
            if buffer is not None:
                buffers[name] = buffer
        return buffers

    def restore(self, tensors: Mapping[str, Tensor], momentum: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`snapshot` and :meth:`momentum` returned.

        Raises:
            BadInputError: they are of another model.
        """
        shapes = {name: parameter.shape for name, parameter in self.tensors.items()}
        if {name: tensor.shape for name, tensor in tensors.items()} != shapes or not momentum.keys() <= shapes.keys():
            raise BadInputError("the checkpoint holds other tensors than the scenario's model")
        for name, tensor in tensors.items():
            self.tensors[name].data.copy_(tensor)
        for name, buffer in momentum.items():
            self._optimizer.state[self.tensors[name]]["momentum_buffer"] = buffer.clone()
