"""Which routed experts travel to which node. Never a function of private data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from model.config import HeldExperts
from server.cohort import public_generator


def assign(
    kind: Literal["all", "random", "balanced"],
    *,
    capacities: Mapping[str, int],
    experts: int,
    per_node: int,
    layers: int,
    seed: int,
    round_number: int,
) -> dict[str, HeldExperts]:
    """Return node → layer → held expert ids, ascending; a pure function of its arguments.

    Args:
        capacities: node → experts per layer it declares it can hold; caps ``per_node``.
        kind: ``all`` gives every expert to every node, whatever ``per_node`` says (capacity still caps);
            ``random`` draws independently per node; ``balanced`` visits nodes in random order, each taking
            the experts with the fewest holders so far, so holders never differ by more than one while
            capacities are equal.
    """
    assigned: dict[str, HeldExperts] = {node: {} for node in capacities}
    wanted = experts if kind == "all" else per_node
    for layer in range(layers):
        generator = public_generator(seed, "assignment", round_number, layer)
        holders = [0] * experts
        order = sorted(capacities)
        generator.shuffle(order)
        for node in order:
            count = min(wanted, capacities[node], experts)
            preference = list(range(experts))
            generator.shuffle(preference)
            if kind == "balanced":
                preference.sort(key=holders.__getitem__)  # stable: ties stay in random order
            chosen = sorted(preference[:count])
            for expert in chosen:
                holders[expert] += 1
            assigned[node][layer] = tuple(chosen)
    return assigned
