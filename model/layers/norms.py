"""Normalisation: each kind acts on one token alone."""

from __future__ import annotations

from typing import Literal

from torch import nn


def make_norm(kind: Literal["rms", "none"], width: int) -> nn.Module:
    """Return the normalisation of that name for tokens of that width."""
    return nn.RMSNorm(width) if kind == "rms" else nn.Identity()
