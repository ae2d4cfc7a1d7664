"""Whether every expert finds holders: the arithmetic before a run, and the count during it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conclave.model.experts.config import HeldExperts
from conclave.server.assign.assignment import assign
from conclave.server.assign.cohort import choose_cohort, expected_share
from conclave.server.rounds.config import FederationConfig

_MOST_ROUNDS_TRIED = 100
_MOST_NODES_TRIED = 20_000  # over all rounds


def shortage(federation: FederationConfig, experts: int, capacities: Sequence[int]) -> str | None:
    """Say why no round can give every expert its ``min_holders``, with the arithmetic; None if one can.

    Args:
        experts: routed experts of a layer.
        capacities: experts per layer that each node of the run can hold.

    A random assignment, or a cohort decided by coins, may still fall short by chance; see :func:`outlook`.
    """
    if federation.expert_scope == "local":  # every node has its own of each
        return None
    held = sorted((_held(federation, experts, capacity) for capacity in capacities), reverse=True)
    cohort = federation.cohort
    if cohort.kind == "fixed":
        held = held[: cohort.size]
    places, needed = sum(held), experts * federation.min_holders
    if places >= needed:
        return None
    each = str(held[0]) if held[0] == held[-1] else f"{held[-1]} to {held[0]}"
    who = f"{len(held)} node{'s' * (len(held) != 1)}"
    return (
        f"federation.min_holders is {federation.min_holders}, must be at most {places // experts}: "
        f"{who}{' a round' * (cohort.kind == 'fixed')} × {each} experts hold {places} places, "
        f"{experts} experts × min_holders {federation.min_holders} need {needed}"
    )


def expected_holders(federation: FederationConfig, experts: int, capacities: Collection[int]) -> float:
    """Return how many nodes train an expert in a round on average, when all that are asked answer.

    Args:
        experts: routed experts of a layer.
        capacities: experts per layer that each node of the federation can hold.
    """
    places = sum(_held(federation, experts, capacity) for capacity in capacities)
    return expected_share(federation.cohort, len(capacities)) * places / experts


@dataclass(frozen=True)
class Outlook:
    """What to expect of a round.

    holders: mean holders of an expert, exact. short: the share of experts, over rounds, that fewer than ``min_holders``
    are asked to train: counted over the run's own cohorts and assignments, in its first 100 rounds at most and in fewer
    with more than 200 nodes.
    """

    holders: float
    short: float


def outlook(
    federation: FederationConfig, experts: int, layers: int, capacities: Mapping[str, int], seed: int
) -> Outlook:
    """Work out how many holders an expert will have if every node answers.

    Args:
        capacities: node → experts per layer it can hold. By the nodes' fingerprints, the shortfall is the run's own;
            by other names, that of a run like it.
    """
    coverage = Coverage(layers, experts, federation.min_holders)
    tried = min(federation.rounds, _MOST_ROUNDS_TRIED, max(1, _MOST_NODES_TRIED // len(capacities)))
    for round_number in range(1, tried + 1):
        taking_part = choose_cohort(list(capacities), federation.cohort, seed, round_number)
        assigned = assign(
            federation.assignment,
            capacities={node: capacities[node] for node in taking_part},
            experts=experts,
            per_node=federation.experts_per_node,
            layers=layers,
            seed=seed,
            round_number=round_number,
            roster=capacities,
            min_holders=federation.min_holders,
        )
        coverage.add(assigned.values())
    return Outlook(
        expected_holders(federation, experts, capacities.values()),
        coverage.short / (coverage.rounds * layers * experts),
    )


class Coverage:
    """Counts, for every expert, the nodes that trained it: in the last round and over the run.

    ``short`` counts (round, layer, expert) with fewer than ``min_holders``.
    """

    def __init__(self, layers: int, experts: int, min_holders: int) -> None:
        self._min_holders = min_holders
        self.rounds = 0
        self.short = 0
        self.last = [[0] * experts for _ in range(layers)]
        self._total = [[0] * experts for _ in range(layers)]
        self._without = [[0] * experts for _ in range(layers)]

    def add(self, held: Iterable[HeldExperts]) -> None:
        """Count a round: what each node trained."""
        counts = [[0] * len(layer) for layer in self.last]
        for node in held:
            for layer, ids in node.items():
                for expert in ids:
                    counts[layer][expert] += 1
        self._count(counts)

    def restore(self, metrics: Iterable[Mapping[str, Any]]) -> None:
        """Count the rounds of an interrupted run, as :meth:`metrics` noted them, unless they are of another model."""
        shape = list(map(len, self.last))
        for line in metrics:
            if list(map(len, line.get("holders", ()))) == shape:
                self._count(line["holders"])

    def metrics(self) -> dict[str, Any]:
        """Return what a round's metrics say, each a list of layers with one number an expert.

        holders: nodes whose reply was accepted, this round. holders_mean: the same, mean over the rounds so far.
        rounds_without_holder: rounds so far in which nobody trained it.
        """
        return {
            "holders": self.last,
            "holders_mean": [[round(total / self.rounds, 4) for total in layer] for layer in self._total],
            "rounds_without_holder": [list(layer) for layer in self._without],
        }

    def _count(self, counts: list[list[int]]) -> None:
        self.rounds += 1
        self.last = counts
        for layer, row in enumerate(counts):
            for expert, count in enumerate(row):
                self._total[layer][expert] += count
                self._without[layer][expert] += count == 0
                self.short += count < self._min_holders


def _held(federation: FederationConfig, experts: int, capacity: int) -> int:
    return min(experts, capacity, experts if federation.assignment == "all" else federation.experts_per_node)
