"""Optimizers of a node's local steps. They see noised gradients only, so their state may be used freely."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from conclave.base.frozen import Frozen


class SgdConfig(Frozen):
    """Plain SGD, with momentum where it is above 0."""

    kind: Literal["sgd"] = "sgd"
    momentum: float = Field(default=0.0, ge=0.0, lt=1.0)


class AdamConfig(Frozen):
    """Adam whose second moment has the known variance of the noise taken out."""

    kind: Literal["adam"] = "adam"
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    beta2: float = Field(default=0.999, ge=0.0, lt=1.0)
    floor: float = Field(default=1e-8, gt=0.0, le=1.0)


OptimizerConfig = Annotated[SgdConfig | AdamConfig, Field(discriminator="kind")]


class NoiseCorrectedAdam(torch.optim.Optimizer):
    """Adam for gradients with Gaussian noise of known variance (DP-AdamBC, Tang et al. 2023, arXiv:2312.14334).

    The second moment of a noised gradient is too large by the noise's variance Φ; where Φ dominates, plain Adam scales
    every coordinate alike. The update is ``m̂ / √max(v̂ − Φ, floor²)``.

    Group keys: ``lr``, ``betas``, ``floor``, ``noise_variance`` (Φ per coordinate, after the division; set before each
    step).
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.999), floor: float = 1e-8
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "floor": floor, "noise_variance": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step with the noised gradients in ``.grad``."""
        if closure is not None:
            raise ValueError("a noised gradient cannot be evaluated again")
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
                state["step"] += 1
                state["mean"].lerp_(parameter.grad, 1.0 - beta1)
                state["square"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1.0 - beta2)
                mean = state["mean"] / (1.0 - beta1 ** state["step"])
                square = state["square"] / (1.0 - beta2 ** state["step"]) - group["noise_variance"]
                parameter.sub_(group["lr"] * mean / square.clamp(min=group["floor"] ** 2).sqrt())


def make_optimizer(
    module: nn.Module, config: SgdConfig | AdamConfig, learning_rate: float, scales: dict[str, float] | None = None
) -> torch.optim.Optimizer:
    """Build the optimizer of a module's trained parameters.

    Args:
        scales: parameter name → factor on the learning rate, 1 where missing.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((scales or {}).get(name, 1.0), []).append(parameter)
    params = [{"params": members, "lr": learning_rate * scale} for scale, members in groups.items()]
    if isinstance(config, AdamConfig):
        return NoiseCorrectedAdam(params, learning_rate, (config.beta1, config.beta2), config.floor)
    return torch.optim.SGD(params, lr=learning_rate, momentum=config.momentum)
