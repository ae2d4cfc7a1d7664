"""Who takes part in a round, and which experts each holds."""

from __future__ import annotations

from collections.abc import Iterable

from conclave.model.experts.config import HeldExperts
from conclave.server.assign.assignment import assign
from conclave.server.assign.cohort import choose_cohort
from conclave.server.rounds.terms import Books, Nodes, Terms

Assignment = dict[str, HeldExperts]
"""Fingerprint of a node → the experts it holds, in the order in which nodes are asked."""


def assign_round(terms: Terms, books: Books, nodes: Nodes, number: int) -> Assignment:
    """Return the cohort of a round and its experts. Where the node is the unit, this charges the round.

    Raises:
        BadInputError: the account of the node level does not allow the round.
    """
    names = [node.fingerprint for node in nodes.values()]
    if books.node_level is not None:
        return books.node_level.begin(names, number)
    cohort = choose_cohort(names, terms.federation.cohort, terms.seed, number)
    return assign_to(cohort, terms, books, nodes, number)


def assign_to(names: Iterable[str], terms: Terms, books: Books, nodes: Nodes, number: int) -> Assignment:
    """Return which experts these of the nodes hold in a round: what they chose, or what the server deals out."""
    federation, model = terms.federation, terms.plan.model
    capacities = {node.fingerprint: node.expert_capacity for node in nodes.values()}
    assigned = assign(
        federation.assignment,
        capacities={name: capacities[name] for name in names},
        experts=model.experts.routed,
        per_node=federation.experts_per_node,
        layers=model.layers,
        seed=terms.seed,
        round_number=number,
        roster=capacities,
        min_holders=federation.min_holders,
    )
    return assigned if books.choices is None else books.choices.assign(assigned, federation.min_holders)
