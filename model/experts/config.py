"""Configuration of the experts, and which of them are held."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from conclave.base.frozen import Frozen
from conclave.model.routers.config import HierarchicalRouterConfig, RouterConfig, SoftmaxRouterConfig


class ExpertsConfig(Frozen):
    """The routed and shared experts of every MoE layer.

    ``top_k`` experts are active per token. An expert has ``depth`` hidden layers of ``hidden`` values. Activation
    ``swiglu`` has two maps into each hidden layer, ``silu(gate) · up`` (Shazeer 2020, arXiv:2002.05202), and so half
    as many parameters again. Fine-grained experts (DeepSeekMoE, arXiv:2401.06066) need nothing special: 4 times as
    many, a quarter as wide, 4 times the ``top_k``. The shared experts are one network, ``shared`` times as wide.

    ``balance`` weighs the per-example load-balancing loss; being per example, it never couples two units (a
    batch-wide loss would raise the sensitivity).
    """

    younger = frozenset({"depth", "router"})
    routed: int = Field(ge=1, le=4096)
    shared: int = Field(default=0, ge=0, le=64)
    hidden: int = Field(ge=8, le=65_536, multiple_of=8)
    depth: int = Field(default=1, ge=1, le=16)
    top_k: int = Field(default=2, ge=1)
    activation: Literal["gelu", "relu", "tanh", "swiglu"] = "gelu"
    balance: float = Field(default=0.01, ge=0.0, le=10.0)
    router: RouterConfig = SoftmaxRouterConfig()

    @model_validator(mode="after")
    def _top_k_exists(self) -> ExpertsConfig:
        if self.top_k > self.routed:
            raise ValueError(f"top_k is {self.top_k}, must be at most the {self.routed} routed experts")
        if isinstance(self.router, HierarchicalRouterConfig):
            self.router.check_fits(self.routed, self.top_k)
        return self


HeldExperts = dict[int, tuple[int, ...]]
"""Layer → global ids of the routed experts present, ascending. Position in the tuple is the local index."""
