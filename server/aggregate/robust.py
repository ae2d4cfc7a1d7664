"""Aggregation that a hostile minority of holders cannot steer. It keeps a round's contributions until its end."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor

from conclave.model.parameters import Owner, owner
from conclave.protocol.codec import norms
from conclave.server.aggregate.aggregation import Aggregator, Averager, WeightedDelta
from conclave.server.aggregate.config import AggregationConfig, Median, NormBounded, TrimmedMean


def make_aggregator(config: AggregationConfig, nodes: Sequence[str]) -> Aggregator:
    """Build what aggregates one round's contributions from ``nodes``."""
    if isinstance(config, TrimmedMean):
        return Trimmed(nodes, config.trim)
    if isinstance(config, Median):
        return Trimmed(nodes, 0.5)
    if isinstance(config, NormBounded):
        return Bounded(nodes, config)
    return Averager(nodes)


class Trimmed(Aggregator):
    """Coordinate-wise trimmed mean; with a share of a half, the median."""

    def __init__(self, nodes: Sequence[str], trim: float) -> None:
        """Leave out the share ``trim`` at each end; see ``config.TrimmedMean``."""
        super().__init__(nodes)
        self._trim = trim
        self._deltas: defaultdict[str, list[Tensor]] = defaultdict(list)

    def _take(self, contribution: WeightedDelta) -> None:
        for name, delta in contribution.delta.items():
            self._deltas[name].append(delta)

    def _aggregated(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: trimmed_mean(torch.stack(self._deltas[name]), self._trim) for name in names}


def trimmed_mean(values: Tensor, trim: float) -> Tensor:
    """Return the mean along the first axis without the ``ceil(trim · n)`` smallest and largest of n values.

    At least one value is left of an odd, two of an even number: ``trim = 0.5`` is the median.
    """
    count = len(values)
    cut = min(math.ceil(trim * count - 1e-9), (count - 1) // 2)  # 0.14 · 50 is a little more than 7
    return values.sort(dim=0).values[cut : count - cut].mean(dim=0)


class Bounded(Aggregator):
    """The weighted mean of contributions, each parameter group of which is scaled down to a bound on its norm."""

    def __init__(self, nodes: Sequence[str], config: NormBounded) -> None:
        """See :class:`conclave.server.aggregate.config.NormBounded`."""
        super().__init__(nodes)
        self._config = config
        self._kept: list[WeightedDelta] = []

    def _take(self, contribution: WeightedDelta) -> None:
        self._kept.append(contribution)

    def _aggregated(self, names: Sequence[str]) -> dict[str, Tensor]:
        norms_of = [_norms_by_group(contribution) for contribution in self._kept]
        bounds: dict[Owner, float] = defaultdict(lambda: self._config.bound)
        if self._config.relative:
            for group in {owner(name) for name in names}:
                bounds[group] = self._config.bound * median(found[group] for found in norms_of if group in found)
        averager, wanted = Averager([kept.node for kept in self._kept]), set(names)
        for kept, found in zip(self._kept, norms_of, strict=True):
            factors = {group: _factor(norm, bounds[group]) for group, norm in found.items()}
            delta = {name: tensor * factors[owner(name)] for name, tensor in kept.delta.items() if name in wanted}
            averager.add(kept.node, WeightedDelta(kept.node, kept.weight, delta))
        return averager.result(min_holders=1)


def _norms_by_group(contribution: WeightedDelta) -> dict[Owner, float]:
    squares: defaultdict[Owner, float] = defaultdict(float)
    for name, norm in zip(contribution.delta, norms(contribution.delta), strict=True):
        squares[owner(name)] += norm**2
    return {group: math.sqrt(square) for group, square in squares.items()}


def _factor(norm: float, bound: float) -> float:
    return 1.0 if norm <= bound else bound / norm
