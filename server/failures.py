"""When a run cannot start with the nodes that are there, and when it came to nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from conclave.base.errors import RunFailedError
from conclave.server.metrics import dropped_by, unchanged
from conclave.server.roster import counted
from conclave.server.rounds.coverage import shortage
from conclave.server.rounds.outcome import RoundOutcome
from conclave.server.rounds.terms import Nodes
from conclave.server.scenario import Scenario


def check_coverage(scenario: Scenario, nodes: Nodes, refused: Counter[str]) -> None:
    """Refuse to start if the nodes that are there cannot give every expert its holders.

    Not where the node is the unit: there, whether a run starts may not depend on who is there.

    Args:
        refused: code → nodes that do not take part for it; told in the error.

    Raises:
        RunFailedError: they cannot.
    """
    if scenario.node_privacy is not None:
        return
    capacities = [node.expert_capacity for node in nodes.values()]
    short = shortage(scenario.federation, scenario.model.experts.routed, capacities)
    if short is not None:
        absent = f"; nodes that do not take part: {counted(refused)}" if refused else ""
        raise RunFailedError(f"{short}{absent}")


def check_somebody_took_part(scenario: Scenario, outcome: RoundOutcome) -> None:
    """End a run that every node refuses; but not if the node is the unit, whose part in a round must not show.

    A node that was charged for this round already takes part in the next one: the run goes on for it.

    Raises:
        RunFailedError: every node that was asked refused.
    """
    refused = outcome.replies.refused
    nobody = outcome.asked > 0 and refused.total() == outcome.asked
    if scenario.node_privacy is None and nobody and not refused["already-charged"]:
        raise RunFailedError(
            f"in round {outcome.number} every node refused ({counted(refused)}); nodes' logs say why, "
            "and with --resume the run goes on after that round"
        )


def check_something_changed(metrics: Sequence[Mapping[str, Any]]) -> None:
    """End a run that changed nothing; but not if its cohorts were empty, which costs nothing and is as planned.

    Args:
        metrics: of all rounds, one mapping a round.

    Raises:
        RunFailedError: no round changed anything.
    """
    if unchanged(metrics) < len(metrics) or not any(line.get("asked", 1) for line in metrics):
        return
    refused, dropped = Counter[str](), Counter(dropped_by(metrics))
    for line in metrics:
        refused.update(line["refused"])
    why = counted(refused + dropped) or "too few nodes answered"
    raise RunFailedError(f"in {len(metrics)} rounds nothing changed the model ({why})")
