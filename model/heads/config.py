"""Configuration of the heads: what is predicted."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from conclave.base.frozen import Frozen


class ClassificationConfig(Frozen):
    """Predict one of ``classes`` labels from the mean over tokens; loss is cross-entropy."""

    kind: Literal["classification"] = "classification"
    classes: int = Field(ge=2, le=1_000_000)


class NextByteConfig(Frozen):
    """Predict each next byte from those before it; the loss of a window is the mean over its positions.

    ``after_next``: weight λ of a second task in training, predicting the byte after next from the token and the next
    byte (multi-token prediction of depth 1, DeepSeek-V3, arXiv:2412.19437, §2.2). Nothing else uses its layers; with 0
    there are none.
    """

    younger = frozenset({"after_next"})
    kind: Literal["next-byte"] = "next-byte"
    after_next: float = Field(default=0.0, ge=0.0, le=10.0)


HeadConfig = Annotated[ClassificationConfig | NextByteConfig, Field(discriminator="kind")]
