"""The server's optimizer: aggregated deltas are pseudo-gradients for ``torch.optim``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from conclave.base.errors import BadInputError
from conclave.server.aggregate.config import ServerAdagrad, ServerAdam, ServerAdamW, ServerOptimizerConfig

OptimizerState = Mapping[str, Mapping[str, Tensor]]
"""Tensor name → what ``torch.optim`` remembers of it, by its own names; step counters are tensors of no dimension."""

_REMEMBERED = {
    "sgd": {"momentum_buffer"},
    "adam": {"step", "exp_avg", "exp_avg_sq"},
    "adamw": {"step", "exp_avg", "exp_avg_sq"},
    "adagrad": {"step", "sum"},
}


class ServerOptimizer:
    """Applies aggregated deltas to the global tensors; state is kept per tensor."""

    def __init__(self, config: ServerOptimizerConfig, tensors: Mapping[str, Tensor]) -> None:
        """Wrap a copy of the global ``tensors`` (float32), which :meth:`step` changes in place."""
        self.tensors = {name: Parameter(tensors[name].clone()) for name in sorted(tensors)}
        self._kind = config.kind
        self._optimizer = _make(config, list(self.tensors.values()))
        (self._group,) = self._optimizer.param_groups

    def step(
        self, averaged: Mapping[str, Tensor], learning_rate: float, scales: Mapping[str, float] | None = None
    ) -> None:
        """Take one step; tensors not in ``averaged`` keep value and optimizer state, Adam's count of steps too.

        Args:
            scales: tensor name → factor on its learning rate, 1 where missing. A factor on the delta itself would do
                nothing under Adam.
        """
        for name, parameter in self.tensors.items():
            parameter.grad = -averaged[name] if name in averaged else None
        self._optimizer.param_groups = self._groups(learning_rate, scales or {})
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _groups(self, learning_rate: float, scales: Mapping[str, float]) -> list[dict[str, object]]:
        """Return torch's parameter groups, one for each rate; state belongs to parameters, not to groups."""
        members: defaultdict[float, list[Parameter]] = defaultdict(list)
        for name, parameter in self.tensors.items():
            members[scales.get(name, 1.0)].append(parameter)
        return [self._group | {"params": params, "lr": learning_rate * scale} for scale, params in members.items()]

    def snapshot(self) -> dict[str, Tensor]:
        """Return the global tensors, detached; they share memory with the optimizer's."""
        return {name: parameter.detach() for name, parameter in self.tensors.items()}

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return everything that the optimizer remembers, sharing its memory; tensors without state are left out."""
        found = {}
        for name, parameter in self.tensors.items():
            kept = {key: value for key, value in self._optimizer.state[parameter].items() if value is not None}
            if kept:
                found[name] = kept
        return found

    def restore(self, tensors: Mapping[str, Tensor], state: OptimizerState) -> None:
        """Restore what :meth:`snapshot` and :meth:`state` returned.

        Raises:
            BadInputError: they are of another model or another optimizer.
        """
        shapes = {name: parameter.shape for name, parameter in self.tensors.items()}
        if {name: tensor.shape for name, tensor in tensors.items()} != shapes or not state.keys() <= shapes.keys():
            raise BadInputError("the checkpoint holds other tensors than the scenario's model")
        for name, kept in state.items():
            expected = {key: torch.Size() if key == "step" else shapes[name] for key in _REMEMBERED[self._kind]}
            if {key: value.shape for key, value in kept.items()} != expected:
                raise BadInputError(f"the checkpoint holds another optimizer's state than that of {self._kind!r}")
        for name, tensor in tensors.items():
            self.tensors[name].data.copy_(tensor)
        for name, kept in state.items():
            self._optimizer.state[self.tensors[name]] = {key: value.clone() for key, value in kept.items()}


def _make(config: ServerOptimizerConfig, params: list[Parameter]) -> torch.optim.Optimizer:
    rate = config.learning_rate
    if isinstance(config, ServerAdamW):
        betas = config.beta1, config.beta2
        return torch.optim.AdamW(params, rate, betas, config.eps, weight_decay=config.weight_decay)
    if isinstance(config, ServerAdam):
        return torch.optim.Adam(params, rate, (config.beta1, config.beta2), config.eps)
    if isinstance(config, ServerAdagrad):
        return torch.optim.Adagrad(params, rate, eps=config.eps)
    return torch.optim.SGD(params, rate, momentum=config.momentum, nesterov=config.nesterov)
