"""Configuration of the privacy mechanism that a run asks for."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from model.config import Frozen


class PrivacyConfig(Frozen):
    """What every node's training is protected by.

    ``mechanism = "gaussian"`` is Poisson-sampled DP-SGD; ``"none"`` exists in simulation only and the ledger
    records ε = ∞. The noise multiplier is not a key: it is calibrated from (ε, δ, plan) with the same filter
    that enforces the budget. Unit is one record, adjacency add or remove one unit.

    ``clip`` bounds a unit's joint gradient over all trained parameters (L2). ``sampling_rate`` is public.
    ``gradients`` picks the Opacus mode: ``hooks`` materialises each unit's gradient and clips what it
    materialised; ``ghost`` uses norms computed apart from the gradients, whose bound does not hold against
    crafted weights in fp32.
    """

    mechanism: Literal["gaussian", "none"] = "gaussian"
    epsilon: float = Field(gt=0.0, le=1e6)
    delta: float = Field(gt=0.0, lt=1.0)
    unit: Literal["record"] = "record"
    clip: float = Field(gt=0.0, le=1e6)
    sampling_rate: float = Field(gt=0.0, le=1.0)
    gradients: Literal["hooks", "ghost"] = "hooks"
