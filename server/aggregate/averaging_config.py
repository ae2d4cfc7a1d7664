"""Configuration of the average over rounds that a run evaluates and publishes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from conclave.base.frozen import Frozen


class NoAverage(Frozen):
    """The last round's model itself."""

    kind: Literal["none"] = "none"


class MovingAverage(Frozen):
    """Exponential: a round weighs ``decay`` times as much as the one after it, and all weights sum to 1.

    1/(1 − decay) rounds are about what it looks back on. Unlike the recursion that starts from the fresh model (De et
    al. 2022, arXiv:2204.13650, warm it up for that), no round before the first has a weight.
    """

    kind: Literal["moving"]
    decay: float = Field(ge=0.0, lt=1.0)


class TailAverage(Frozen):
    """Uniform over the last ``share`` of the run's rounds; before those begin, the model itself.

    Uniform tail averaging of what DP-SGD releases: Shejwalkar et al. 2022, arXiv:2210.01864.
    """

    kind: Literal["tail"]
    share: float = Field(gt=0.0, le=1.0)


AverageConfig = Annotated[NoAverage | MovingAverage | TailAverage, Field(discriminator="kind")]
