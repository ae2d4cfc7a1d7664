"""What anyone knows about an honest delta before it arrives: how large its noise is, and the most its signal can be.

A node's delta is ``−lr·Σ_t c_t·(S_t + N_t)/(q·size)``, where S_t is the sum of the clipped gradients of step t, N_t is
Gaussian with σC for each coordinate, and c_t is what momentum makes of a step: 1 without it. Everything but S_t is
public. Divided by the noise's standard deviation, coordinate by coordinate, it is a standard normal vector plus a
signal of at most ``signal``, L2, over all coordinates together.

S_t cannot depend on the noise of its own or a later step; on earlier steps' it can, through the weights. The bounds
below hold for any such dependence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from conclave.model.experts.config import HeldExperts
from conclave.privacy.releases.load_histogram import DELTA
from conclave.privacy.training.local_optimizers import SgdConfig
from conclave.protocol.plan import Plan

MORE_UNITS = 1.05
"""A node may hold so many times the units that it declares: simulated nodes round to two significant digits."""


@dataclass(frozen=True)
class PublicNoise:
    """Noise and signal of a node's honest delta of a round.

    std: standard deviation of a coordinate's noise; an expert's is multiplied by its rate's factor. signal: how long
    the signal is at most, in units of it. last: the share of ``std`` that comes from the last step. single: whether
    there is but one step, so no signal can depend on any of the noise. risk: chance that the signal is longer.
    """

    std: float
    signal: float
    last: float
    single: bool

    @classmethod
    def of(cls, plan: Plan, declared_size: int, share: float, risk: float) -> PublicNoise:
        """Return what a plan with privacy, a fixed clip bound and plain or momentum SGD makes of a node.

        Args:
            share: largest norm of the sum of a batch's clipped gradients, as a share of units × clip bound; 1 always
                holds.
            risk: chance that Poisson sampling draws more units than the signal allows for.
        """
        training, privacy = plan.training, plan.privacy
        if not isinstance(training.optimizer, SgdConfig) or plan.noise_multiplier is None:
            raise ValueError("the noise of a delta is known for SGD with privacy only")
        momentum, sigma = training.optimizer.momentum, plan.noise_parts[DELTA]
        step_S = np.arange(1, training.steps + 1)
        reach_S = (1.0 - momentum**step_S) / (1.0 - momentum)  # c_t, the last step first
        length = math.sqrt(float((reach_S**2).sum()))
        per_step = training.learning_rate * sigma * privacy.clip / (privacy.sampling_rate * declared_size)
        units = most_units(math.ceil(MORE_UNITS * declared_size) * training.steps, privacy.sampling_rate, risk)
        return cls(
            std=per_step * length,
            signal=share * float(reach_S[-1]) * units / (sigma * length),
            last=float(reach_S[0]) / length,
            single=training.steps == 1,
        )

    def norm_range(self, count: int, risk: float) -> tuple[float, float]:
        """Return the range of an honest vector's norm, over ``count`` coordinates, in units of ``std``.

        The chance to be below or above is at most ``risk`` each. With one step, ‖noise + signal‖² is a noncentral χ²,
        and its tails are bounded as by Birgé (2001); with more, the noise's norm plus or minus the
        signal's.
        """
        x = -math.log(risk)
        spread = 2.0 * math.sqrt(count * x)
        low = math.sqrt(max(0.0, count - spread)) if count > 4.0 * x else 0.0
        if self.single:
            longer = self.signal**2
            return low, math.sqrt(count + longer + 2.0 * math.sqrt((count + 2.0 * longer) * x) + 2.0 * x)
        return max(0.0, low - self.signal), math.sqrt(count + spread + 2.0 * x) + self.signal

    def distance(self, count: int, risk: float) -> float:
        """Return how far apart ``count`` honest coordinates' distribution and the standard normal one may be.

        In the Kolmogorov–Smirnov distance; more has a chance of at most ``risk``. Given everything before the last
        step's noise, that noise makes independent coordinates, and their empirical distribution is close to the mean
        of theirs (Bretagnolle's inequality: Shorack and Wellner 1986, p. 797). That mean is close to the one without
        signal: a shift of t moves a normal distribution of deviation ``last`` by at most 2Φ(t/(2·last)) − 1, concave
        in t, so by Jensen nothing moves it further than the same shift everywhere. And that one, a smoothed empirical
        distribution of the earlier noise, is close to the normal (Massart 1990).
        """
        if not self.single:
            risk /= 2.0
        near = math.sqrt(math.log(2.0 * math.e / risk) / (2.0 * count))
        if not self.single:
            near += math.sqrt(math.log(2.0 / risk) / (2.0 * count))
        shift = self.signal / (self.last * math.sqrt(count))
        return near + math.erf(shift / (2.0 * math.sqrt(2.0)))

    def along(self, risk: float) -> float:
        """Return how much of an honest vector lies along a direction fixed before; more has chance ``risk`` a side."""
        return self.signal + math.sqrt(-2.0 * math.log(risk))


def most_units(units: int, rate: float, risk: float) -> float:
    """Return how many of ``units`` Poisson sampling draws at most, except with probability ``risk`` (Bernstein)."""
    x = -math.log(risk)
    return min(float(units), rate * units + math.sqrt(2.0 * units * rate * (1.0 - rate) * x) + x / 3.0)


def expert_factor(plan: Plan, held: HeldExperts, layer: int) -> float:
    """Return the factor on the learning rate of a layer's experts on a node that holds ``held``."""
    if plan.training.expert_learning_rate == "same":
        return 1.0
    return len(held[layer]) / plan.model.experts.routed
