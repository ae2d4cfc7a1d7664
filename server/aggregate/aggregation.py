"""From nodes' deltas to one pseudo-gradient, tensor by tensor over its holders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from conclave.model.parameters import owner


@dataclass(frozen=True)
class WeightedDelta:
    """A validated reply: wire name → delta, and the weight of the node that sent it (> 0)."""

    node: str
    weight: float
    delta: Mapping[str, Tensor]


class Aggregator(ABC):
    """Makes one delta of each tensor out of those of its holders.

    Contributions may come in any order and the result has the same bits: they are taken in the order of ``nodes``, and
    an early one waits for its turn.

    holders: tensor name → how many contributions have it, once there is a result.
    """

    def __init__(self, nodes: Sequence[str]) -> None:
        """Expect contributions from ``nodes``, in this order; not all need come."""
        self._turn = {node: number for number, node in enumerate(nodes)}
        self._early: dict[int, WeightedDelta | None] = {}
        self._next = 0
        self.holders: Counter[str] = Counter()

    def add(self, node: str, contribution: WeightedDelta | None) -> None:
        """Take a node's contribution; None says that there will be none."""
        self._early[self._turn[node]] = contribution
        while self._next in self._early:
            self._count(self._early.pop(self._next))
            self._next += 1

    def result(self, min_holders: int) -> dict[str, Tensor]:
        """Return name → aggregated delta. All contributions hold the shared weights.

        A router row or expert with fewer than ``min_holders`` is left out of the result: it keeps its value.
        """
        for turn in sorted(self._early):
            self._count(self._early.pop(turn))
        enough = (n for n, count in self.holders.items() if owner(n).layer is None or count >= min_holders)
        return self._aggregated(sorted(enough))

    def _count(self, contribution: WeightedDelta | None) -> None:
        if contribution is not None:
            self.holders.update(contribution.delta.keys())
            self._take(contribution)

    @abstractmethod
    def _take(self, contribution: WeightedDelta) -> None:
        """Take the contribution whose turn it is."""

    @abstractmethod
    def _aggregated(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the aggregated deltas of these tensors, which all have holders."""


class Averager(Aggregator):
    """Averages each tensor over the nodes that hold it, in float32, weights normalised per tensor.

    While contributions come in turn, none waits and none is kept.
    """

    def __init__(self, nodes: Sequence[str]) -> None:
        super().__init__(nodes)
        self._weight: dict[str, float] = {}
        self._total: dict[str, Tensor] = {}

    def _aggregated(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: self._total[name] / self._weight[name] for name in names}

    def _take(self, contribution: WeightedDelta) -> None:
        for name, delta in contribution.delta.items():
            self._weight[name] = self._weight.get(name, 0.0) + contribution.weight
            if name in self._total:
                self._total[name].add_(delta, alpha=contribution.weight)
            else:
                self._total[name] = delta * contribution.weight
