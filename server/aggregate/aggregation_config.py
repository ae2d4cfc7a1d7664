"""Configuration of how the deltas of an expert's holders become one."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from conclave.base.frozen import Frozen


class Mean(Frozen):
    """The weighted mean over the holders. One hostile holder moves it as far as its weight and norm allow."""

    kind: Literal["mean"] = "mean"


class TrimmedMean(Frozen):
    """At every coordinate, the mean of what is left without the largest and the smallest values.

    trim: the share of a tensor's holders that is left out at each end, rounded up: of four holders and 0.1, one. The
    result is bounded by honest values while at most this share is hostile (Yin et al. 2018, arXiv:1803.01498). At
    least one or two values are always left. Weights are not used.
    """

    kind: Literal["trimmed-mean"]
    trim: float = Field(default=0.1, gt=0.0, lt=0.5)


class Median(Frozen):
    """At every coordinate, the median over the holders (Yin et al. 2018). Weights are not used."""

    kind: Literal["median"]


class NormBounded(Frozen):
    """The weighted mean of deltas whose norm, parameter group by parameter group, is cut to a bound.

    relative: ``bound`` is a multiple of the median norm of the group's holders, otherwise it is the norm itself.
    """

    kind: Literal["norm-bounded"]
    bound: float = Field(default=1.0, gt=0.0, le=1e6)
    relative: bool = True


AggregationConfig = Annotated[Mean | TrimmedMean | Median | NormBounded, Field(discriminator="kind")]
