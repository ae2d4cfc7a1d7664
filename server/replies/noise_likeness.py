"""Whether a delta looks like what an honest node must send: public Gaussian noise, and a signal that cannot be long.

A lie that is as long as the noise passes every test of length, because an honest delta is mostly noise. But it
must then be noise. Following the first stage of Xiang et al. 2023 (arXiv:2304.09762), a delta is compared with the
noise that its node had to add, in units of which :class:`conclave.server.replies.public_noise.PublicNoise` knows
everything:

* the norm, of all and of each parameter group (shared, router, experts), is neither above nor below what chance and
  signal explain;
* in each group, the coordinates' distribution is as close to the normal one, by Kolmogorov and Smirnov, as they
  explain;
* the delta lies along the sum of what its node sent before by no more than they explain: noise is new every round, and
  a lie that always points the same way is not.

Guarantee: with ``signal = 1``, a reply made as the plan asks, by a node with at most 1.05 times the units it declared,
fails with a chance of at most 10^-6, whatever its records and the weights are. It assumes that the noise is well above
the float32 rounding of the weights that it is added to. Everything here is computed from released values: it costs no
privacy.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from conclave.model.experts.config import HeldExperts
from conclave.model.parameters import owner
from conclave.protocol.encodings import error_bounds
from conclave.protocol.plan import Plan
from conclave.server.aggregate.balancing import BIAS
from conclave.server.replies.config import NoiseTestConfig
from conclave.server.replies.public_noise import PublicNoise, expert_factor

FALSE_ALARM = 1e-6
"""Largest chance that one honest reply fails."""

_RISK = FALSE_ALARM / 16
"""Of each of at most 14 events: too many units sampled; norms of all and three groups, too low or too high; three
distances; too much along the past, on two sides."""

_STEP = 1.0 / 16
"""Rounding on the wire by up to so much, in standard deviations, is allowed for in a distribution; more counts as gone.
The largest of an int8 row's normal values is below 7, and its scale below 7/126."""

History = dict[str, dict[str, Tensor]]
"""Node → wire name → the sum of what it sent for it, each in units of its noise."""


@dataclass(frozen=True)
class Standardised:
    """A delta in units of its noise, wire name → float32, and what is public about that noise.

    A selection bias has no noise and is left out: only the server moves it, whatever a node sends for it.
    """

    noise: PublicNoise
    values: dict[str, Tensor]

    @classmethod
    def of(
        cls, plan: Plan, held: HeldExperts, delta: Mapping[str, Tensor], declared_size: int, signal: float
    ) -> Standardised:
        """Divide a delta, of the expected names and shapes, by its noise's standard deviation."""
        noise = PublicNoise.of(plan, declared_size, signal, _RISK)
        values = {}
        for name, tensor in delta.items():
            group, layer, _ = owner(name)
            if not name.endswith(f"/{BIAS}"):
                factor = 1.0 if group != "expert" or layer is None else expert_factor(plan, held, layer)
                values[name] = tensor / (noise.std * factor)
        return cls(noise, values)


class NoiseTest:
    """Tests the replies of a run. What a node sent counts in later rounds once :meth:`remember` is called.

    history: all that is remembered; up to one float32 copy of the model per node.
    """

    def __init__(self, plan: Plan, config: NoiseTestConfig) -> None:
        """Test against the noise of ``plan``, which must be known: see :class:`conclave.server.scenario.Scenario`."""
        self._plan, self._signal, self._across_rounds = plan, config.signal, config.across_rounds
        self.history: History = {}

    def restore(self, history: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Put back the ``history`` that a checkpoint kept."""
        self.history = {node: dict(sums) for node, sums in history.items()}

    def standardise(self, held: HeldExperts, delta: Mapping[str, Tensor], declared_size: int) -> Standardised:
        """Return a delta, of the expected names and shapes and finite, in units of the noise of its node."""
        return Standardised.of(self._plan, held, delta, declared_size, self._signal)

    def flaw(self, node: str, reply: Standardised) -> str | None:
        """Return what shows that a delta is not that of an honest node; None if nothing does."""
        noise, groups, errors = reply.noise, _by_group(reply.values), self._errors(reply.values)
        squares = {group: _square(z) for group, z in groups.items()}
        rounding = {group: _square(error) for group, error in errors.items()}
        parts = {group: (len(z), squares[group], rounding.get(group, 0.0)) for group, z in groups.items()}
        parts["delta"] = (sum(map(len, groups.values())), sum(squares.values()), sum(rounding.values()))
        for part, (count, square, error) in parts.items():
            low, high = noise.norm_range(count, _RISK)
            low, norm, high = low - math.sqrt(error), math.sqrt(square), high + math.sqrt(error)
            if not low <= norm <= high:
                return f"the norm of its {part} is {norm:.5g} times its noise, must be from {low:.5g} to {high:.5g}"
        for group, z in groups.items():
            most = noise.distance(len(z), _RISK) + (_crossing(errors[group]) if errors else 0.0)
            if most < 1.0 and (found := distance_from_normal(z)) > most:
                return f"its {group} is {found:.3f} away from normal, must be at most {most:.3f}"
        found, most = self._along(node, reply.values), noise.along(_RISK) + math.sqrt(parts["delta"][2])
        if abs(found) > most:
            return f"{found:.4g} of it lie along what its node sent before, must be at most {most:.4g}"
        return None

    def remember(self, node: str, reply: Standardised) -> None:
        """Compare later deltas of the node with this one too, unless rounds are tested one by one."""
        if not self._across_rounds:
            return
        sums = self.history.setdefault(node, {})
        for name, z in reply.values.items():
            sums[name] = sums[name] + z if name in sums else z

    def _errors(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        encoding = self._plan.traffic.delta
        if encoding == "fp32":
            return {}
        return _by_group({name: error_bounds(z, encoding) for name, z in values.items()})

    def _along(self, node: str, values: Mapping[str, Tensor]) -> float:
        """Return the part of a vector that lies along the sum of the node's earlier ones, where both have values."""
        sums = self.history.get(node, {})
        both = sorted(values.keys() & sums.keys())
        if not both:
            return 0.0
        now = torch.cat([values[name].flatten() for name in both]).double()
        before = torch.cat([sums[name].flatten() for name in both]).double()
        return float(now @ before) / float(torch.linalg.vector_norm(before))


def distance_from_normal(z: Tensor) -> float:
    """Return the Kolmogorov–Smirnov distance of a flat tensor's values from the standard normal distribution."""
    count = len(z)
    ordered = torch.from_numpy(np.sort(z.numpy()))  # numpy sorts many times as fast
    normal = torch.special.ndtr(ordered.double())
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    return float(torch.maximum(steps[1:] - normal, normal - steps[:-1]).max())


def _crossing(error: Tensor) -> float:
    """Return how far rounding by up to ``error`` can move a normal distribution function: φ(0) times it."""
    return _STEP / math.sqrt(2.0 * math.pi) + float((error > _STEP).double().mean())


def _by_group(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = defaultdict(list)
    for name, z in values.items():
        parts[owner(name).group].append(z.flatten())
    return {group: torch.cat(found) for group, found in parts.items()}


def _square(z: Tensor) -> float:
    return float(torch.linalg.vector_norm(z, dtype=torch.float64)) ** 2
