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
from privacy.clipping import AdaptiveClip
from privacy.load_histogram import DELTA
from privacy.local_optimizers import AdamConfig
from server.config import ServerOptimizerConfig


@dataclass(frozen=True)
class Contribution:
    """A validated reply: wire name → delta, and the weight of the node that sent it (> 0)."""

    node: str
    weight: float
    delta: Mapping[str, Tensor]


class Averager:
    """Averages each tensor over the nodes that hold it, in float32, weights normalised per tensor.

    Contributions may come in any order and the result has the same bits: they are added in the order of
    ``nodes``, and one that comes early waits for its turn. In that order, none waits and none is kept.
    """

    def __init__(self, nodes: Sequence[str]) -> None:
        """Expect contributions from ``nodes``, in this order; not all need come."""
        self._turn = {node: number for number, node in enumerate(nodes)}
        self._early: dict[int, Contribution | None] = {}
        self._next = 0
        self._holders: Counter[str] = Counter()
        self._weight: dict[str, float] = {}
        self._total: dict[str, Tensor] = {}

    def add(self, node: str, contribution: Contribution | None) -> None:
        """Take a node's contribution; None says that there will be none."""
        self._early[self._turn[node]] = contribution
        while self._next in self._early:
            self._sum(self._early.pop(self._next))
            self._next += 1

    def result(self, min_holders: int) -> dict[str, Tensor]:
        """Return the averages. Shared weights are averaged over all contributions.

        A router row or expert with fewer than ``min_holders`` is left out of the result: it keeps its value.
        """
        for turn in sorted(self._early):
            self._sum(self._early.pop(turn))
        return {
            name: self._total[name] / self._weight[name]
            for name in sorted(self._total)
            if owner(name).layer is None or self._holders[name] >= min_holders
        }

    def _sum(self, contribution: Contribution | None) -> None:
        if contribution is None:
            return
        for name, delta in contribution.delta.items():
            self._holders[name] += 1
            self._weight[name] = self._weight.get(name, 0.0) + contribution.weight
            if name in self._total:
                self._total[name].add_(delta, alpha=contribution.weight)
            else:
                self._total[name] = delta * contribution.weight


def norm_bound(plan: Plan, parameters: int, declared_size: int, round_number: int) -> float:
    """Return the largest plausible L2 norm of an honest delta of a round; infinite without privacy.

    ``3·lr·steps·(C + σC√d/(q·size))``: the clipped gradient and the noise on d parameters. Noise is by far
    the larger part, so the bound must allow for it. Momentum m makes steps up to 1/(1 − m) times as long, Adam up to
    1/floor times, and an adaptive bound may have grown with every step since round one.
    """
    if plan.noise_multiplier is None:
        return math.inf
    clip, rate = plan.privacy.clip, plan.privacy.sampling_rate
    multiplier, optimizer = plan.noise_parts[DELTA], plan.training.optimizer
    if plan.privacy.clipping == "adaptive":
        rule = AdaptiveClip()
        multiplier = rule.gradient_noise_multiplier(multiplier, rate * declared_size)
        clip *= math.exp(min(rule.rate * rule.quantile * (round_number * plan.training.steps - 1), 100.0))
    noise = multiplier * clip * math.sqrt(parameters) / (rate * declared_size)
    longer = 1.0 / optimizer.floor if isinstance(optimizer, AdamConfig) else 1.0 / (1.0 - optimizer.momentum)
    return 3.0 * longer * plan.training.learning_rate * plan.training.steps * (clip + noise)


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
