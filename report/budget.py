"""A ledger's budget for its owner: what ``conclave node budget`` and ``node export`` do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from conclave.base.errors import BadInputError
from conclave.base.whole_file import new_file, write_atomically
from conclave.clients.folder.node_directory import NodeDirectory
from conclave.privacy.ledger.genesis import Side
from conclave.privacy.ledger.reading.history import History, LedgerFile, open_history, write_export
from conclave.privacy.ledger.reading.spending import Budget, Forecast, budget_of, forecast
from conclave.protocol.charges import whole_cost
from conclave.protocol.messages import ProtocolError
from conclave.server.scenario import Scenario


@dataclass
class PlannedRun:
    """What a scenario would add. refused: why the node's policy or budget would refuse it; None if it would not."""

    scenario: str
    plan_hash: str
    forecast: Forecast
    refused: str | None


@dataclass
class BudgetReport:
    """Where a budget stands, and what a planned run would change."""

    source: str
    budget: Budget
    planned: PlannedRun | None = None
    plot: str | None = None


def budget_report(
    source: Path, scenario: Scenario | None, plot: Path | None, *, side: Side = "training"
) -> BudgetReport:
    """Sum up the ledger of a node's folder, a ledger file or an export.

    Args:
        side: of a node's folder, which ledger.
        scenario: what it would add is worked out; a node's policy is asked too.
        plot: where to write a chart of ε over time, as SVG.

    Raises:
        BadInputError: no ledger there, a plan without privacy, or the chart cannot be written.
    """
    history = _history(source, side)
    report = BudgetReport(str(source), budget_of(history))
    if scenario is not None:
        report.planned = _planned(source, history, report.budget, scenario)
    if plot is not None:
        try:
            from conclave.report import charts

            write_atomically(plot, charts.budget(report.budget).encode())
        except OSError as error:
            raise BadInputError(f"--plot {plot}: cannot be written ({error.strerror})") from error
        report.plot = str(plot)
    return report


def export_ledger(source: Path, out: Path, *, side: Side = "training") -> int:
    """Write the export of a ledger to a new file, readable by its owner only; return the number of entries.

    Raises:
        BadInputError: no ledger there, or the file exists or cannot be written.
    """
    history = _history(source, side)
    try:
        with new_file(out, mode=0o600) as stream:
            return write_export(history, stream)
    except OSError as error:
        raise BadInputError(f"{out}: cannot be written ({error.strerror}), must be a new file") from error


def _history(source: Path, side: Side) -> History:
    return open_history(NodeDirectory(source).files(side).path if source.is_dir() else source)


def _planned(source: Path, history: History, budget: Budget, scenario: Scenario) -> PlannedRun:
    plan = scenario.plan()
    if history.genesis.side == "held-out" and plan.evaluation is None:
        raise BadInputError(f"--plan {scenario.name}: measures nothing on held-out units, must have [evaluation]")
    charges = whole_cost(plan, history.genesis.side)
    if not charges:
        raise BadInputError(f"--plan {scenario.name}: trains without privacy, so no budget allows it")
    expected = forecast(budget, history.genesis, charges)
    refused = None if expected.fits else "the budget does not suffice"
    if plan.privacy.unit != budget.unit:
        refused = f"the budget protects a {budget.unit}, the plan a {plan.privacy.unit}"
    elif source.is_dir():
        try:
            node = NodeDirectory(source)
            policy = node.config.policy
            policy.check(plan, scenario.name, float(LedgerFile(node.training.path).genesis.order))
            if history.genesis.side == "held-out":
                policy.check_evaluation(plan)
        except ProtocolError as error:
            refused = str(error)
    return PlannedRun(scenario.name, plan.hash, expected, refused)
