"""Configuration of the way from deltas to the next model: aggregation, the server's optimizer, averages over rounds."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

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


class NoAverage(Frozen):
    """The last round's model itself."""

    kind: Literal["none"] = "none"


class MovingAverage(Frozen):
    """Exponential: a round weighs ``decay`` times as much as the one after it, and all weights sum to 1.

    It looks back over about 1/(1 − decay) rounds. Unlike the recursion that starts from the fresh model (De et
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


class _Optimizer(Frozen):
    kind: str
    learning_rate: float = Field(default=1.0, gt=0.0, le=1e4)


class _Momentum(_Optimizer):
    momentum: float = Field(default=0.0, ge=0.0, lt=1.0)


class _Scheduled(_Optimizer):
    """A learning rate that falls over the rounds.

    decay: the share that is lost, over the whole run (``linear``, ``cosine``) or every ``step_rounds`` (``step``).
    schedule: its shape; ``constant`` loses nothing.
    warmup_rounds: the rate first rises for so many rounds, in equal steps; the schedule begins after them.
    """

    decay: float = Field(default=0.0, ge=0.0, le=1.0)
    schedule: Literal["constant", "linear", "cosine", "step"] = "linear"
    step_rounds: int = Field(default=10, ge=1)
    warmup_rounds: int = Field(default=0, ge=0)

    younger: ClassVar[frozenset[str]] = frozenset({"schedule", "step_rounds", "warmup_rounds"})

    @model_validator(mode="after")
    def _constant_loses_nothing(self) -> Self:
        if self.schedule == "constant" and self.decay > 0.0:
            raise ValueError(f"decay is {self.decay}, must be 0 with schedule 'constant'")
        return self

    def rate(self, round_number: int, rounds: int) -> float:
        """Return the learning rate of a round (1 to ``rounds``), a function of its number alone."""
        if round_number <= self.warmup_rounds:
            return self.learning_rate * round_number / (self.warmup_rounds + 1)
        done, last = round_number - 1 - self.warmup_rounds, max(1, rounds - 1 - self.warmup_rounds)
        if self.schedule == "step":
            return float(self.learning_rate * (1.0 - self.decay) ** (done // self.step_rounds))
        if self.schedule == "cosine":
            return self.learning_rate * (1.0 - self.decay * 0.5 * (1.0 - math.cos(math.pi * done / last)))
        return self.learning_rate * (1.0 - self.decay * done / last)


class ServerSgd(_Scheduled, _Momentum):
    """Learning rate 1 and momentum 0 is FedAvg; momentum above 0 is FedAvgM (Hsu et al. 2019, arXiv:1909.06335)."""

    # The bases are in this order for the order of the fields, which a run's number is a hash of.
    kind: Literal["sgd"] = "sgd"
    nesterov: bool = False

    younger: ClassVar[frozenset[str]] = _Scheduled.younger | {"nesterov"}

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0.0:
            raise ValueError("momentum is 0.0, must be above 0 with nesterov")
        return self


class _Adaptive(_Scheduled):
    """FedOpt (Reddi et al. 2020, arXiv:2003.00295): ``eps`` is the paper's τ, and as large as there.

    A pseudo-gradient is far smaller than a gradient's usual 1; with tiny ``eps`` every coordinate, even one that holds
    nothing but noise, moves by the learning rate. Unlike the paper, torch corrects Adam's moments for their start.
    """

    learning_rate: float = Field(default=0.01, gt=0.0, le=1e4)
    eps: float = Field(default=1e-3, gt=0.0, le=1.0)


class _Moments(_Adaptive):
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    beta2: float = Field(default=0.99, ge=0.0, lt=1.0)


class ServerAdam(_Moments):
    """FedAdam."""

    kind: Literal["adam"]


class ServerAdamW(_Moments):
    """FedAdam with decoupled weight decay. A tensor that nobody contributed to does not decay."""

    kind: Literal["adamw"]
    weight_decay: float = Field(default=0.01, ge=0.0, lt=1.0)


class ServerAdagrad(_Adaptive):
    """FedAdagrad, without momentum."""

    kind: Literal["adagrad"]


ServerOptimizerConfig = Annotated[ServerSgd | ServerAdam | ServerAdamW | ServerAdagrad, Field(discriminator="kind")]
"""The aggregate delta is a pseudo-gradient for this optimizer."""
