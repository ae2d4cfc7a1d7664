"""A run from its first question to its model: describe nodes, admit them, go round by round, finish.

The steps of a round are in :mod:`conclave.server.rounds.round`, with why this is not a Flower ``Strategy``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from flwr.serverapp import Grid

from conclave.data.sources import public_test
from conclave.server.assign.choices import Choices
from conclave.server.failures import check_coverage, check_somebody_took_part, check_something_changed
from conclave.server.node_level.account import NodeAccount
from conclave.server.node_level.rounds import NodeLevelRounds
from conclave.server.record import Record
from conclave.server.replies.receipts import ReceiptBook
from conclave.server.roster import Roster, counted
from conclave.server.rounds.model_state import ModelState, initial_tensors
from conclave.server.rounds.round import Rounds
from conclave.server.rounds.terms import Books, Nodes, Terms
from conclave.server.run_directory import RunDirectory
from conclave.server.scenario import Scenario
from conclave.server.trainable import check_trainable

log = logging.getLogger("conclave.server")


def run_scenario(
    grid: Grid,
    scenario: Scenario,
    run: RunDirectory,
    run_id: str,
    on_round: Callable[[Mapping[str, Any]], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Run the rounds that are left and leave metrics, checkpoint and model in the run directory.

    A directory with a checkpoint continues after its round, with the state it had; so a killed run that is
    started again does what it would have done. Rounds that nodes were already charged for cost nothing again.

    Args:
        run_id: names the run in every charge.
        on_round: told each round's metrics.
        say: is told in words how many nodes refused, and why, how each round went, what was lost, or that nothing is
            left to do.

    Raises:
        BadInputError: the scenario cannot be carried out, the model cannot be trained as it asks, or the checkpoint is
            damaged or belongs to another plan.
        RunFailedError: too few nodes take part, every node that was asked refused a round, or no round changed
            anything.
    """
    run.note_code()
    terms = _terms(scenario, run_id)
    check_trainable(scenario)
    test = public_test(scenario.data)
    model = ModelState(terms, initial_tensors(terms.plan, scenario.seed))
    roster = Roster(grid, scenario, terms.plan, run_id)
    nodes: Nodes = roster.describe()
    books = _open_books(scenario, run, terms)
    log.info("%d nodes, assignment %s, weights %s", len(nodes), terms.federation.assignment, terms.federation.weights)
    record = Record(run, terms, model, on_round, say)
    done = record.resume()
    if done == terms.plan.rounds:
        say(f"all {done} rounds were done before; nothing is left to do")
    else:
        nodes = _admit(roster, nodes, scenario, say)
    record.keep_only(done)
    rounds = Rounds(grid, terms, model, books, test)
    for number in range(done + 1, terms.plan.rounds + 1):
        started = time.perf_counter()
        if number > done + 1 and roster.refresh():
            nodes = roster.members()
        outcome = rounds.go(number, nodes)
        record.add(outcome, time.perf_counter() - started)
        check_somebody_took_part(scenario, outcome)
    _finish(run, scenario, model, roster, books)


def _terms(scenario: Scenario, run_id: str) -> Terms:
    return Terms(
        run_id=run_id,
        scenario=scenario.name,
        seed=scenario.seed,
        plan=scenario.plan(),
        federation=scenario.federation,
        balancing=scenario.balancing,
    )


def _open_books(scenario: Scenario, run: RunDirectory, terms: Terms) -> Books:
    """Open what earlier rounds of the run kept, or begin it."""
    receipts = ReceiptBook(run.receipts)
    level, mechanism = scenario.node_privacy, scenario.node_mechanism()
    node_level = None
    if level is not None and mechanism is not None:
        node_level = NodeLevelRounds(
            NodeAccount.open(run.node_account, level, scenario.seed),
            config=level,
            mechanism=mechanism,
            plan=terms.plan,
            run_id=terms.run_id,
            experts_per_node=terms.federation.experts_per_node,
            seed=terms.seed,
        )
    choices = None if terms.plan.affinity is None else Choices(terms.plan, run.choices)
    return Books(receipts, choices, node_level)


def _admit(roster: Roster, described: Nodes, scenario: Scenario, say: Callable[[str], None]) -> Nodes:
    """Let the described nodes set their budget aside; return those that did. Enough must be there before and after."""
    check_coverage(scenario, described, roster.refused)  # before any budget is set aside
    nodes = roster.admit()
    if roster.refused:
        say(f"nodes that do not take part: {counted(roster.refused)}")
    check_coverage(scenario, nodes, roster.refused)  # What is set aside stays: with more nodes the run can still go on.
    return nodes


def _finish(run: RunDirectory, scenario: Scenario, model: ModelState, roster: Roster, books: Books) -> None:
    """Publish the model, and let nodes have back what they set aside and did not use."""
    run.save_model(scenario.model, model.published)
    roster.close()
    if books.node_level is not None:
        books.node_level.close()
    check_something_changed(run.whole_metrics())
