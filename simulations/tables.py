"""What the command line prints for people: tables on the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from privacy.audit.subject import Finding
from privacy.ledger.verification import LedgerAudit
from server.plan_estimate import PlanEstimate
from server.scenario import Scenario
from simulations.simulate import Summary


def print_summary(scenario: Scenario, summary: Summary, report_path: Path) -> None:
    """Print what a simulation came to."""
    table = Table(show_header=False, box=None, pad_edge=False)
    if summary.accuracy is not None:
        table.add_row("accuracy", f"{summary.accuracy:.4f} on {scenario.data.test_records} public test records")
    if summary.bits_per_byte is not None:
        table.add_row(
            "bits per byte",
            f"{summary.bits_per_byte:.4f} on {scenario.data.test_records} public test windows "
            f"(order-0 entropy of the same bytes: {summary.order0_bits_per_byte:.4f})",
        )
    if scenario.privacy.mechanism == "none":
        table.add_row("privacy", "NONE (epsilon = infinity)")
    else:
        budget = f"budget {scenario.privacy.epsilon:g}, per {scenario.privacy.unit} and node"
        table.add_row("epsilon", f"{summary.epsilon:.4f} at delta {summary.delta:g} ({budget})")
    share = summary.bytes_per_node / summary.bytes_full_model
    table.add_row("traffic", f"{summary.bytes_per_node:,} bytes a node and round, {share:.0%} of the whole model's")
    table.add_row("rounds", str(summary.rounds))
    table.add_row("run", str(summary.run))
    table.add_row("report", str(report_path))
    Console(soft_wrap=True).print(table)


def print_plan(estimate: PlanEstimate) -> None:
    """Print what a scenario will cost."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("rounds", f"{estimate.rounds}, {estimate.steps} local steps on a node that takes part in each")
    if estimate.noise_multiplier is None:
        table.add_row("privacy", "NONE (epsilon = infinity)")
    else:
        table.add_row("noise", f"sigma {estimate.noise_multiplier:g}")
        table.add_row("epsilon", f"{estimate.epsilon:.4f} at delta {estimate.delta:g}, RDP at order {estimate.order:g}")
        others = ", ".join(f"{name.upper()} {value:.4f}" for name, value in estimate.accountants.items())
        table.add_row("", f"for comparison: {others}")
    share = estimate.parameters_per_node / estimate.parameters_total
    table.add_row(
        "parameters",
        f"{estimate.parameters_total:,} in all, {estimate.parameters_per_node:,} ({share:.0%}) on a node",
    )
    table.add_row("traffic", f"{estimate.bytes_down:,} bytes to a node and {estimate.bytes_up:,} back, every round")
    table.add_row(
        "", f"{(estimate.bytes_down + estimate.bytes_up) / estimate.bytes_full_model:.0%} of the whole model's"
    )
    table.add_row(
        "time",
        f"{estimate.seconds_total:.1f} s of local training in all, "
        f"{estimate.seconds_per_node_round * 1e3:.1f} ms a node and round, on this machine",
    )
    Console(soft_wrap=True).print(table)


def print_findings(findings: list[Finding]) -> None:
    """Print what an audit of a model found."""
    table = Table("check", "looked at", "verdict")
    for finding in findings:
        verdict = f"[red]VIOLATED: {escape(finding.violation)}[/]" if finding.violation else "not refuted"
        table.add_row(finding.check, escape(finding.looked_at), verdict)
    Console().print(table)


def print_ledger_audits(results: dict[str, LedgerAudit]) -> None:
    """Print what audits of ledgers found, by the file they read."""
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
    console = Console(soft_wrap=True)
    console.print(table)
    for path, result in results.items():
        for finding in result.findings:
            console.print(f"{path}: {finding}", markup=False, highlight=False)
        if result.seeded:
            console.print(f"{path}: seeded randomness, a simulation", markup=False, highlight=False)
