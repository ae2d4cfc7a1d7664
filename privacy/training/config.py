"""Configuration of the privacy mechanism that a run asks for."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from conclave.base.frozen import Frozen
from conclave.privacy.accounting.mechanisms import SMALLEST_RATE
from conclave.privacy.gradients.clipping import SMALLEST_CLIP, ClipKind


class PrivacyConfig(Frozen):
    """What every node's training is protected by.

    ``mechanism = "gaussian"`` is Poisson-sampled DP-SGD; ``"none"`` exists in simulation only and the ledger
    records ε = ∞. The noise multiplier is not a key: it is calibrated from (ε, δ, plan) with the same filter
    that enforces the budget. Adjacency: add or
    remove one unit.

    ``clip`` bounds a unit's joint gradient over all trained parameters (L2). ``sampling_rate`` is public.

    ``unit = "group"`` protects all records of a group at once, of which at most ``records_per_unit`` take part.

    ``clipping``: ``flat``, ``per-layer``, ``automatic`` or ``adaptive``, see
    :mod:`conclave.privacy.gradients.clipping`.

    ``gradients`` picks the mode, see :mod:`conclave.privacy.gradients.modes`: ``bookkeeping`` (one backward pass,
    certified norms), ``hooks`` (Opacus, materialises each unit's gradient), ``ghost`` (Opacus, norms that are not
    certified).

    ``numeric = "strict"`` runs each unit alone and sums on a grid of integers: the bound then holds against crafted
    weights too, at many times the cost.
    """

    mechanism: Literal["gaussian", "none"] = "gaussian"
    epsilon: float = Field(gt=0.0, le=1e6)
    delta: float = Field(gt=0.0, lt=1.0)
    unit: Literal["record", "group"] = "record"
    records_per_unit: int | None = Field(default=None, ge=1, le=1_000_000)
    clip: float = Field(ge=SMALLEST_CLIP, le=1e6)
    clipping: ClipKind = "flat"
    sampling_rate: float = Field(ge=SMALLEST_RATE, le=1.0)
    gradients: Literal["bookkeeping", "hooks", "ghost"] = "bookkeeping"
    numeric: Literal["fast", "strict"] = "fast"

    @model_validator(mode="after")
    def _fits_together(self) -> PrivacyConfig:
        if (self.unit == "group") != (self.records_per_unit is not None):
            raise ValueError("records_per_unit must be set for unit 'group', and for no other")
        if self.gradients == "ghost" and self.numeric == "fast":
            if self.unit == "group":
                raise ValueError("gradients is 'ghost', must be 'bookkeeping' or 'hooks' where groups are the unit")
            if self.clipping == "per-layer":
                raise ValueError("clipping is 'per-layer', must be 'flat', 'automatic' or 'adaptive' with 'ghost'")
        return self
