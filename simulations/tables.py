"""What the command line prints for people: tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from privacy.audit.subject import Finding
from privacy.ledger.verification import LedgerAudit
from server.plan_estimate import PlanEstimate
from server.run_audit import RunAudit
from server.scenario import Scenario
from simulations.audit_ledger import LedgersAudit
from simulations.baseline_note import BaselineNote
from simulations.budget import BudgetReport
from simulations.model_card import ModelCard
from simulations.simulate import Summary

_WIDTH_OF_A_PIPE = 200


def _console() -> Console:
    """Return the terminal; where there is none, a width at which nothing is cut."""
    console = Console(soft_wrap=True)
    return console if console.is_terminal else Console(soft_wrap=True, width=_WIDTH_OF_A_PIPE)


def print_summary(scenario: Scenario, summary: Summary, report_path: Path) -> None:
    """Print what a simulation came to."""
    table = Table(show_header=False, box=None, pad_edge=False)
    note = summary.baseline
    if note is not None:
        table.add_row("baseline", f"{note.kind} of {note.of}{_said_of(note)}")
    if summary.accuracy is not None:
        table.add_row("accuracy", f"{summary.accuracy:.4f} on {scenario.data.test_records} public test records")
    if summary.bits_per_byte is not None:
        table.add_row(
            "bits per byte",
            f"{summary.bits_per_byte:.4f} on {scenario.data.test_records} public test windows "
            f"(order-0 entropy of the same bytes: {summary.order0_bits_per_byte:.4f})",
        )
    if scenario.federation.expert_scope != "federated":
        table.add_row("", "of what is shared: the experts that stay on nodes are silent in it")
    if scenario.privacy.mechanism == "none":
        table.add_row("privacy", "NONE (epsilon = infinity)")
    else:
        budget = f"budget {scenario.privacy.epsilon:g}, per {scenario.privacy.unit} and node"
        table.add_row("epsilon", f"{summary.epsilon:.4f} at delta {summary.delta:g} ({budget})")
    if scenario.node_privacy is not None:
        node = scenario.node_privacy
        table.add_row(
            "node level",
            f"epsilon {summary.node_epsilon:.4f} at delta {node.delta:g} (budget {node.epsilon:g}, per node, "
            "for the published model; the server is trusted)",
        )
    if summary.held_out is not None:
        table.add_row("held out", said_of_held_out(summary.held_out))
        if scenario.privacy.mechanism != "none":
            spent = f"epsilon {summary.held_out_epsilon:.4f} at delta {summary.delta:g}"
            table.add_row("", f"{spent}, of an account of its own: no unit both trains and is held out")
    if note is None or note.federated:
        share = summary.bytes_per_node / summary.bytes_full_model
        table.add_row("traffic", f"{summary.bytes_per_node:,} bytes a node and round, {share:.0%} of the whole model's")
    unchanged = f", of which {summary.unchanged} had too few replies and changed nothing" if summary.unchanged else ""
    table.add_row("rounds", f"{summary.rounds}{unchanged}")
    if summary.dropped_by:
        table.add_row("dropped", ", ".join(f"{count} {reason}" for reason, count in summary.dropped_by.items()))
    table.add_row("run", str(summary.run))
    table.add_row("report", str(report_path))
    _console().print(table)


def said_of_held_out(evaluation: Mapping[str, Any]) -> str:
    """Say what a private evaluation came to, a sentence without its end."""
    metric = evaluation["metric"].replace("_", " ")
    told = sum(pair is not None for pair in evaluation["by_node"].values())

    def said(pair: list[float] | None) -> str:
        return "drowned in noise" if pair is None else f"{pair[0]:.4f} ± {pair[1]:.4f}"

    units, nodes = said(evaluation["over_units"]), said(evaluation["over_nodes"])
    return f"{metric} {units} over held-out units, {nodes} as the mean of {told} nodes (± is the noise alone)"


def _said_of(note: BaselineNote) -> str:
    if note.parameters is not None and note.parameters_wanted is not None:
        match = note.parameters / note.parameters_wanted
        return f": {note.parameters:,} parameters for {note.parameters_wanted:,}, {match:.1%}"
    if note.quality_of_nodes:
        low, high = min(note.quality_of_nodes), max(note.quality_of_nodes)
        return f": mean of {len(note.quality_of_nodes)} nodes, from {low:.4f} to {high:.4f}"
    return ""


def print_plan(estimate: PlanEstimate) -> None:
    """Print what a scenario will cost."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("plan", estimate.plan_hash)
    table.add_row("rounds", f"{estimate.rounds}, {estimate.steps} local steps on a node that takes part in each")
    if estimate.noise_multiplier is None:
        table.add_row("privacy", "NONE (epsilon = infinity)")
    else:
        table.add_row("noise", f"sigma {estimate.noise_multiplier:g}")
        if estimate.load_share:
            sigma = {name: f"{noise:.6g}" for name, noise in estimate.noise_parts.items()}
            table.add_row(
                "",
                f"of which expert loads get {estimate.load_share:.1%} of the precision: sigma {sigma['delta']} for the "
                f"gradient, {sigma['loads']} for the loads; without balancing, {estimate.noise_multiplier:g} for the "
                "gradient",
            )
        table.add_row("epsilon", f"{estimate.epsilon:.4f} at delta {estimate.delta:g}, RDP at order {estimate.order:g}")
        others = ", ".join(f"{name.upper()} {value:.4f}" for name, value in estimate.accountants.items())
        table.add_row("", f"for comparison: {others}")
    if estimate.choices:
        table.add_row(
            "choices", f"{estimate.choices} times a node chooses its experts, {estimate.choice_share:.1%} of the budget"
        )
    if estimate.evaluations:
        table.add_row(
            "held out",
            f"{estimate.evaluations} evaluations, {_noise(estimate.evaluation_noise)}, from an account of their own",
        )
    if estimate.node_epsilon is not None:
        table.add_row(
            "node level",
            f"sigma {estimate.node_noise_multiplier:g}, epsilon {estimate.node_epsilon:.4f} "
            f"at delta {estimate.node_delta:g} for the published model",
        )
    share = estimate.parameters_per_node / estimate.parameters_total
    table.add_row(
        "parameters",
        f"{estimate.parameters_total:,} in all, {estimate.parameters_per_node:,} ({share:.0%}) on a node",
    )
    table.add_row("traffic", f"{estimate.bytes_down:,} bytes to a node and {estimate.bytes_up:,} back, every round")
    table.add_row(
        "", f"{(estimate.bytes_down + estimate.bytes_up) / estimate.bytes_full_model:.0%} of the whole model's"
    )
    table.add_row("holders", f"{estimate.holders_per_expert:.1f} expected of an expert in a round")
    if estimate.short_of_holders:
        table.add_row("", f"below federation.min_holders: {estimate.short_of_holders:.1%} of experts and rounds")
    table.add_row(
        "time",
        f"{estimate.seconds_total:.1f} s of local training in all, "
        f"{estimate.seconds_per_node_round * 1e3:.1f} ms a node and round, on this machine",
    )
    _console().print(table)


def _noise(multiplier: float | None) -> str:
    return "without noise" if multiplier is None else f"sigma {multiplier:g} each"


def print_model_card(card: ModelCard) -> None:
    """Print what a model looks like and costs."""
    costs = card.costs
    table = Table(show_header=False, box=None, pad_edge=False)
    shared = f", {card.shared} shared" if card.shared else ""
    table.add_row(
        "layers", f"{card.layers} ({card.preset}), each with {card.routed} routed experts{shared}, top {card.top_k}"
    )
    for group, count in costs.parameters.items():
        table.add_row(group, f"{count:,} parameters, {count / costs.total:.0%}")
    table.add_row("total", f"{costs.total:,} parameters; {costs.expert:,} in one expert")
    table.add_row("active", f"{costs.active:,} parameters for a token, {costs.active / costs.total:.0%}")
    table.add_row("operations", f"{costs.flops_per_token:,} for a token, forward")
    both = card.bytes_down + card.bytes_up
    table.add_row("traffic", f"{card.bytes_down:,} bytes to a node and {card.bytes_up:,} back, every round")
    table.add_row("", f"{both / card.bytes_full_model:.0%} of the whole model's")
    console = _console()
    console.print(table)
    console.print("\nwho holds what in a round, for example (one column an expert)")
    for node, held in card.held.items():
        rows = ("".join("■" if e in ids else "·" for e in range(card.routed)) for _, ids in sorted(held.items()))
        console.print(f"{node:<10}" + "  ".join(rows), highlight=False)
    if card.plot is not None:
        console.print(card.plot, markup=False, highlight=False)


def print_findings(findings: list[Finding]) -> None:
    """Print what an audit of a model found."""
    table = Table("check", "looked at", "verdict")
    for finding in findings:
        verdict = "not refuted"
        if finding.violation is not None:
            verdict = f"[red]VIOLATED: {escape(finding.violation)}[/]"
        elif finding.incomplete is not None:
            verdict = f"[yellow]INCOMPLETE: {escape(finding.incomplete)}[/]"
        table.add_row(finding.check, escape(finding.looked_at), verdict)
    _console().print(table)


def print_ledger_audits(audit: LedgersAudit) -> None:
    """Print what audits of ledgers found, by the file they read."""
    _print_ledgers(audit.ledgers)


def print_run_audit(audit: RunAudit) -> None:
    """Print whether receipts, ledgers and plan of a run tell one story."""
    _print_ledgers(audit.ledgers)
    if audit.held_out:
        _console().print("ledgers of held-out units")
        _print_ledgers(audit.held_out)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("rounds", f"{audit.rounds}, {audit.nodes} nodes sent receipts")
    table.add_row("receipts", f"{audit.receipts}, of which {audit.matched} match a committed charge and its output")
    if audit.lost:
        table.add_row("lost", f"{audit.lost} receipts of what a restored ledger lost; its whole budget was charged")
    if audit.unreceived:
        table.add_row("unreceived", f"{audit.unreceived} paid replies that did not arrive")
    if audit.node_level is not None:
        spent = f"epsilon {audit.node_level.epsilon:.4f} for the published model, the node as the unit"
        table.add_row("node level", f"{spent}{', findings below' if audit.node_level.findings else ''}")
    if audit.missing_ledgers:
        table.add_row("missing", f"the ledgers of {', '.join(audit.missing_ledgers)}: give them with --ledger")
    table.add_row("verdict", audit.verdict)
    console = _console()
    console.print(table)
    for finding in audit.findings:
        console.print(finding, markup=False, highlight=False)


def _print_ledgers(results: Mapping[str, LedgerAudit]) -> None:
    table = Table("ledger", "charges", "epsilon", "budget", "delta", "RDP", "PLD", "PRV", "verdict", box=None)
    for path, result in results.items():
        accountants = [
            f"{result.accountants[name]:.4f}" if name in result.accountants else "-" for name in ("rdp", "pld", "prv")
        ]
        table.add_row(
            Path(path).name,
            str(result.charges),
            f"{result.epsilon:.4f}",
            f"{result.budget:g}",
            f"{result.delta:g}",
            *accountants,
            "VIOLATED" if result.findings else "holds",
        )
    console = _console()
    console.print(table)
    for path, result in results.items():
        notes = [*result.findings, *result.joint]
        if result.seeded:
            notes.append("seeded randomness, a simulation")
        if result.pending:
            notes.append(f"{result.pending} charges reserved and neither committed nor abandoned; they are spent")
        if result.grid is not None:
            notes.append(f"for PLD and PRV, {result.grid}")
        if result.unproven:
            notes.append("was restored from a copy that may lack entries; the rest of the budget was charged for them")
        for note in notes:
            console.print(f"{path}: {note}", markup=False, highlight=False)


def print_budget(report: BudgetReport) -> None:
    """Print where a budget stands, what each run took, and what a planned run would add."""
    budget = report.budget
    console = _console()
    totals = Table("", "epsilon", "share of the budget", box=None, pad_edge=False)
    totals.add_row("spent", f"{budget.spent:.4f}", f"{budget.shares['spent']:.1%}")
    totals.add_row("with what is set aside", f"{budget.committed_to:.4f}", f"{1 - budget.shares['left']:.1%}")
    totals.add_row("budget", f"{budget.epsilon:g}", "100.0%")
    protects = f"per {budget.unit}, at delta {budget.delta:g}; RDP at order {budget.order:g}, which adds up"
    console.print(f"dataset {budget.dataset_id}: {protects}", markup=False, highlight=False)
    console.print(totals)
    runs = Table("run", "charges", "abandoned", "share", "set aside", "first", "last", box=None, pad_edge=False)
    for run in budget.runs:
        aside = "" if not run.set_aside else f"{run.set_aside_share:.1%}"
        runs.add_row(
            escape(run.run_id), str(run.charges), str(run.abandoned), f"{run.share:.1%}", aside, run.first, run.last
        )
    if budget.runs:
        console.print(runs)
    if report.planned is not None:
        planned = report.planned
        verdict = "would be admitted" if planned.refused is None else f"would be refused: {planned.refused}"
        console.print(
            f"{planned.scenario} would add {planned.forecast.charges} charges, {planned.forecast.share:.1%} of the "
            f"budget: epsilon {planned.forecast.epsilon_after:.4f} afterwards; it {verdict}",
            markup=False,
            highlight=False,
        )
        others = ", ".join(f"{name.upper()} {value:.4f}" for name, value in planned.forecast.accountants.items())
        console.print(f"the plan alone, for comparison: {others}", highlight=False)
    if report.plot is not None:
        console.print(report.plot, markup=False, highlight=False)
