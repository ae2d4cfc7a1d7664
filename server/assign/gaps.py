"""Assignment by what nodes chose: their choices, moved as little as every expert's minimum of holders needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def fill_gaps(choices: Mapping[str, Sequence[int]], experts: int, min_holders: int) -> dict[str, tuple[int, ...]]:
    """Return node → expert ids of one layer, ascending: each node as many as it chose.

    A node's choices come most wanted first, and the released order is all that is used of them. Where an expert has too
    few holders, a node gives one up: the one that wants its own expert least, among those whose expert has holders to
    spare; ties go to the first name.

    Args:
        choices: node → different expert ids, most wanted first.
        experts: how many there are.
        min_holders: how many every expert should have, if the places suffice.
    """
    held = {node: list(wanted) for node, wanted in sorted(choices.items())}
    holders = [sum(expert in wanted for wanted in held.values()) for expert in range(experts)]
    for missing in range(experts):
        while holders[missing] < min_holders:
            spare = [
                (-place, node, expert)
                for node, wanted in held.items()
                if missing not in wanted
                for place, expert in enumerate(wanted)
                if holders[expert] > min_holders
            ]
            if not spare:
                break
            place, node, expert = min(spare)
            held[node][-place] = missing
            holders[expert] -= 1
            holders[missing] += 1
    return {node: tuple(sorted(wanted)) for node, wanted in held.items()}
