"""Which routed experts travel to which node. Never a function of private data."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

from conclave.model.experts.config import HeldExperts
from conclave.server.assign.cohort import public_generator

AssignmentKind = Literal["all", "random", "balanced", "sticky", "affinity"]

_Layer = dict[str, set[int]]
"""Node → experts of one layer."""


def assign(
    kind: AssignmentKind,
    *,
    capacities: Mapping[str, int],
    experts: int,
    per_node: int,
    layers: int,
    seed: int,
    round_number: int,
    roster: Mapping[str, int] | None = None,
    min_holders: int = 1,
) -> dict[str, HeldExperts]:
    """Return node → layer → held expert ids, ascending; a pure function of its arguments.

    Args:
        capacities: node → experts per layer it declares it can hold; caps ``per_node``. The nodes of the round.
        kind: ``all`` gives every expert to every node, whatever ``per_node`` says (capacity still caps);
            ``random`` draws independently per node; ``balanced`` visits nodes in random order, each taking
            the experts with the fewest holders so far; ``sticky`` is the same in every round, see below.
        roster: node → capacity of every node of the run, for ``sticky``; the nodes of the round if not given.
        min_holders: what ``sticky`` must reach for every expert.

    Guarantees: ``balanced`` holders never differ by more than one, whatever the capacities, so the fewest holders of an
    expert are as many as any assignment allows (places over experts, rounded down): a node that takes the c least held
    experts keeps levels {m, m + 1} within {m, m + 1} or {m + 1, m + 2}.

    ``sticky``: every node ranks the experts by a hash of its own (rendezvous hashing, Thaler and Ravishankar 1998) and
    takes the first ones. Where that leaves an expert of the roster short of ``min_holders``, a node gives up one with
    holders to spare for it; so one swap for each missing holder, which no repair can do with less. A round without
    some of the nodes is repaired in the same way, and afterwards everybody has their old experts again. Without missing
    holders, who joins or leaves moves nobody; otherwise no more others than holders are missing before and after.
    """
    wanted = {node: min(experts, capacity if kind == "all" else min(per_node, capacity))
              for node, capacity in capacities.items()}  # fmt: skip
    assigned: dict[str, HeldExperts] = {node: {} for node in capacities}
    home = wanted if roster is None else {node: min(per_node, experts, capacity) for node, capacity in roster.items()}
    for layer in range(layers):
        if kind == "sticky":
            dealt = _sticky(wanted, home, experts, layer, seed, min_holders)
        else:
            dealt = _by_turns(kind, wanted, experts, layer, seed, round_number)
        for node, held in dealt.items():
            assigned[node][layer] = tuple(sorted(held))
    return assigned


def _by_turns(
    kind: AssignmentKind, wanted: Mapping[str, int], experts: int, layer: int, seed: int, round_number: int
) -> _Layer:
    generator = public_generator(seed, "assignment", round_number, layer)
    holders = [0] * experts
    order = sorted(wanted)
    generator.shuffle(order)
    dealt: _Layer = {}
    for node in order:
        preference = list(range(experts))
        generator.shuffle(preference)
        if kind in ("balanced", "affinity"):
            preference.sort(key=holders.__getitem__)  # stable: ties stay in random order
        dealt[node] = set(preference[: wanted[node]])
        for expert in dealt[node]:
            holders[expert] += 1
    return dealt


def _sticky(
    wanted: Mapping[str, int], home: Mapping[str, int], experts: int, layer: int, seed: int, min_holders: int
) -> _Layer:
    at_home = _home(tuple(sorted(home.items())), experts, layer, seed, min_holders)
    dealt = {node: set(at_home[node]) for node in sorted(wanted)}
    _repair(dealt, experts, layer, seed, min_holders)
    return dealt


@lru_cache(maxsize=256)  # the layers of one roster: the same in every round
def _home(
    wanted: tuple[tuple[str, int], ...], experts: int, layer: int, seed: int, min_holders: int
) -> dict[str, frozenset[int]]:
    dealt: _Layer = {}
    for node, count in wanted:
        scores = _scores(seed, layer, node, experts)
        dealt[node] = set(sorted(range(experts), key=lambda expert: -scores[expert])[:count])
    _repair(dealt, experts, layer, seed, min_holders)
    return {node: frozenset(held) for node, held in dealt.items()}


def _repair(dealt: _Layer, experts: int, layer: int, seed: int, min_holders: int) -> None:
    """Swap experts with holders to spare for those that lack some, in place, one swap for each missing holder.

    There is always a node to swap: an expert with more holders than another has one that the other lacks. Where there
    are too few places for everybody's minimum, all get what an even share allows, and as many as possible one more.
    """
    holders = [0] * experts
    for held in dealt.values():
        for expert in held:
            holders[expert] += 1
    even = sum(holders) // experts
    for level in (min(even, min_holders), min(even + 1, min_holders)):
        for expert in range(experts):
            while holders[expert] < level and (swap := _best_swap(dealt, holders, expert, level, layer, seed)):
                node, given_up = swap
                dealt[node].remove(given_up)
                dealt[node].add(expert)
                holders[given_up] -= 1
                holders[expert] += 1


def _best_swap(
    dealt: _Layer, holders: list[int], expert: int, level: int, layer: int, seed: int
) -> tuple[str, int] | None:
    """Return the node that ranks ``expert`` highest of those that can take it, and what it gives up for it."""
    best: tuple[float, str, int] | None = None
    for node, held in dealt.items():
        if expert in held:
            continue
        scores = _scores(seed, layer, node, len(holders))
        if best is not None and scores[expert] <= best[0]:
            continue
        spare = [other for other in held if holders[other] > level]
        if spare:
            best = scores[expert], node, min(spare, key=scores.__getitem__)
    return None if best is None else best[1:]


@lru_cache(maxsize=65_536)
def _scores(seed: int, layer: int, node: str, experts: int) -> tuple[float, ...]:
    """How much a node is for each expert: hashed, so that no other node's presence changes it."""
    generator = public_generator(seed, "sticky", layer, node)
    return tuple(generator.random() for _ in range(experts))
