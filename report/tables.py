"""What the command line prints for people: tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conclave.report.printing import Cell, Fields, can_show, print_line, print_table

if TYPE_CHECKING:  # a command loads what it works out, and not what the others do
    from conclave.audit.ledger import LedgersAudit
    from conclave.audit.run import RunAudit
    from conclave.privacy.audit.subject import Finding
    from conclave.privacy.ledger.reading.verification import LedgerAudit
    from conclave.report.budget import BudgetReport
    from conclave.report.model_card import ModelCard
    from conclave.server.estimate import PlanEstimate
    from conclave.server.scenario import Scenario
    from conclave.simulations.baseline_note import BaselineNote
    from conclave.simulations.simulate import Summary


def print_summary(scenario: Scenario, summary: Summary, report_path: Path) -> None:
    """Print the results of a simulation."""
    fields = Fields()
    note = summary.baseline
    if note is not None:
        fields.add("baseline", f"{note.kind} of {note.of}{_said_of(note)}")
    if summary.accuracy is not None:
        fields.add("accuracy", f"{summary.accuracy:.4f} on {scenario.data.test_records} public test records")
    if summary.bits_per_byte is not None:
        fields.add(
            "bits per byte",
            f"{summary.bits_per_byte:.4f} on {scenario.data.test_records} public test windows "
            f"(order-0 entropy of the same bytes: {summary.order0_bits_per_byte:.4f})",
        )
    if scenario.federation.expert_scope != "federated":
        fields.add("", "of what is shared: the experts that stay on nodes are silent in it")
    if scenario.privacy.mechanism == "none":
        fields.add("privacy", "NONE (epsilon = infinity)")
    else:
        budget = f"budget {scenario.privacy.epsilon:g}, per {scenario.privacy.unit} and node"
        fields.add("epsilon", f"{summary.epsilon:.4f} at delta {summary.delta:g} ({budget})")
    if scenario.node_privacy is not None:
        node = scenario.node_privacy
        fields.add(
            "node level",
            f"epsilon {summary.node_epsilon:.4f} at delta {node.delta:g} (budget {node.epsilon:g}, per node, "
            "for the published model; the server is trusted)",
        )
    if summary.held_out is not None:
        fields.add("held out", said_of_held_out(summary.held_out))
        if scenario.privacy.mechanism != "none":
            spent = f"epsilon {summary.held_out_epsilon:.4f} at delta {summary.delta:g}"
            fields.add("", f"{spent}, of an account of its own: no unit both trains and is held out")
    if note is None or note.federated:
        share = summary.bytes_per_node / summary.bytes_full_model
        fields.add("traffic", f"{summary.bytes_per_node:,} bytes a node and round, {share:.0%} of the whole model's")
    unchanged = f", of which {summary.unchanged} had too few replies and changed nothing" if summary.unchanged else ""
    fields.add("rounds", f"{summary.rounds}{unchanged}")
    if summary.dropped_by:
        fields.add("dropped", ", ".join(f"{count} {reason}" for reason, count in summary.dropped_by.items()))
    fields.add("run", str(summary.run))
    fields.add("report", str(report_path))
    fields.print()


def said_of_held_out(evaluation: Mapping[str, Any]) -> str:
    """Return the result of a private evaluation, as a sentence without its end."""
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
    fields = Fields()
    fields.add("plan", estimate.plan_hash)
    fields.add("rounds", f"{estimate.rounds}, {estimate.steps} local steps on a node that takes part in each")
    if estimate.noise_multiplier is None:
        fields.add("privacy", "NONE (epsilon = infinity)")
    else:
        fields.add("noise", f"sigma {estimate.noise_multiplier:g}")
        if estimate.load_share:
            sigma = {name: f"{noise:.6g}" for name, noise in estimate.noise_parts.items()}
            fields.add(
                "",
                f"of which expert loads get {estimate.load_share:.1%} of the precision: sigma {sigma['delta']} for the "
                f"gradient, {sigma['loads']} for the loads; without balancing, {estimate.noise_multiplier:g} for the "
                "gradient",
            )
        fields.add("epsilon", f"{estimate.epsilon:.4f} at delta {estimate.delta:g}, RDP at order {estimate.order:g}")
        others = ", ".join(f"{name.upper()} {value:.4f}" for name, value in estimate.accountants.items())
        fields.add("", f"for comparison: {others}")
    if estimate.choices:
        fields.add(
            "choices", f"{estimate.choices} times a node chooses its experts, {estimate.choice_share:.1%} of the budget"
        )
    if estimate.evaluations:
        fields.add(
            "held out",
            f"{estimate.evaluations} evaluations, {_noise(estimate.evaluation_noise)}, from an account of their own",
        )
    if estimate.node_epsilon is not None:
        fields.add(
            "node level",
            f"sigma {estimate.node_noise_multiplier:g}, epsilon {estimate.node_epsilon:.4f} "
            f"at delta {estimate.node_delta:g} for the published model",
        )
    share = estimate.parameters_per_node / estimate.parameters_total
    fields.add(
        "parameters",
        f"{estimate.parameters_total:,} in all, {estimate.parameters_per_node:,} ({share:.0%}) on a node",
    )
    fields.add("traffic", f"{estimate.bytes_down:,} bytes to a node and {estimate.bytes_up:,} back, every round")
    fields.add("", f"{(estimate.bytes_down + estimate.bytes_up) / estimate.bytes_full_model:.0%} of the whole model's")
    fields.add("holders", f"{estimate.holders_per_expert:.1f} expected of an expert in a round")
    if estimate.short_of_holders:
        fields.add("", f"below federation.min_holders: {estimate.short_of_holders:.1%} of experts and rounds")
    fields.add(
        "time",
        f"{estimate.seconds_total:.1f} s of local training in all, "
        f"{estimate.seconds_per_node_round * 1e3:.1f} ms a node and round, on this machine",
    )
    fields.print()


def _noise(multiplier: float | None) -> str:
    return "without noise" if multiplier is None else f"sigma {multiplier:g} each"


def print_model_card(card: ModelCard) -> None:
    """Print what a model looks like and costs."""
    costs = card.costs
    fields = Fields()
    shared = f", {card.shared} shared" if card.shared else ""
    fields.add(
        "layers", f"{card.layers} ({card.preset}), each with {card.routed} routed experts{shared}, top {card.top_k}"
    )
    for group, count in costs.parameters.items():
        fields.add(group, f"{count:,} parameters, {count / costs.total:.0%}")
    fields.add("total", f"{costs.total:,} parameters; {costs.expert:,} in one expert")
    fields.add("active", f"{costs.active:,} parameters for a token, {costs.active / costs.total:.0%}")
    fields.add("operations", f"{costs.flops_per_token:,} for a token, forward")
    both = card.bytes_down + card.bytes_up
    fields.add("traffic", f"{card.bytes_down:,} bytes to a node and {card.bytes_up:,} back, every round")
    fields.add("", f"{both / card.bytes_full_model:.0%} of the whole model's")
    fields.print()
    print_line()
    print_line("who holds what in a round, for example (one column an expert)")
    filled, free = ("■", "·") if can_show("■·") else ("#", ".")
    for node, held in card.held.items():
        rows = ("".join(filled if e in ids else free for e in range(card.routed)) for _, ids in sorted(held.items()))
        print_line(f"{node:<10}" + "  ".join(rows))
    if card.plot is not None:
        print_line(card.plot)


def print_findings(findings: list[Finding]) -> None:
    """Print what an audit of a model found."""
    rows: list[tuple[Cell, ...]] = []
    for finding in findings:
        verdict: Cell = "not refuted"
        if finding.violation is not None:
            verdict = (f"VIOLATED: {finding.violation}", "red")
        elif finding.incomplete is not None:
            verdict = (f"INCOMPLETE: {finding.incomplete}", "yellow")
        rows.append((finding.check, finding.looked_at, verdict))
    print_table(("check", "looked at", "verdict"), rows)


def print_ledger_audits(audit: LedgersAudit) -> None:
    """Print what audits of ledgers found, by the file they read."""
    _print_ledgers(audit.ledgers)


def print_run_audit(audit: RunAudit) -> None:
    """Print whether receipts, ledgers and plan of a run tell one story."""
    _print_ledgers(audit.ledgers)
    if audit.held_out:
        print_line("ledgers of held-out units")
        _print_ledgers(audit.held_out)
    fields = Fields()
    fields.add("rounds", f"{audit.rounds}, {audit.nodes} nodes sent receipts")
    fields.add("receipts", f"{audit.receipts}, of which {audit.matched} match a committed charge and its output")
    if audit.lost:
        fields.add("lost", f"{audit.lost} receipts of what a restored ledger lost; its whole budget was charged")
    if audit.unreceived:
        fields.add("unreceived", f"{audit.unreceived} paid replies that did not arrive")
    if audit.node_level is not None:
        spent = f"epsilon {audit.node_level.epsilon:.4f} for the published model, the node as the unit"
        fields.add("node level", f"{spent}{', findings below' if audit.node_level.findings else ''}")
    if audit.missing_ledgers:
        fields.add("missing", f"the ledgers of {', '.join(audit.missing_ledgers)}: give them with --ledger")
    if audit.unexamined:
        count = f"{sum(audit.unexamined.values())} charges of other runs in {len(audit.unexamined)} ledgers"
        fields.add("unexamined", f"{count}, priced as they state themselves: give those runs with --also")
    if audit.unknown_code:
        hashes = ", ".join(sorted({code for codes in audit.unknown_code.values() for code in codes}))
        fields.add("code", f"nobody vouches for {hashes}: give those that you trust with --code")
    fields.add("verdict", audit.verdict)
    fields.print()
    for finding in audit.findings:
        print_line(finding)


def _print_ledgers(results: Mapping[str, LedgerAudit]) -> None:
    rows = []
    for path, result in results.items():
        accountants = [
            f"{result.accountants[name]:.4f}" if name in result.accountants else "-" for name in ("rdp", "pld", "prv")
        ]
        rows.append(
            (
                Path(path).name,
                str(result.charges),
                f"{result.epsilon:.4f}",
                f"{result.budget:g}",
                f"{result.delta:g}",
                *accountants,
                "VIOLATED" if result.findings else "holds",
            )
        )
    print_table(("ledger", "charges", "epsilon", "budget", "delta", "RDP", "PLD", "PRV", "verdict"), rows)
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
            print_line(f"{path}: {note}")


def print_budget(report: BudgetReport) -> None:
    """Print where a budget stands, what each run took, and what a planned run would add."""
    budget = report.budget
    protects = f"per {budget.unit}, at delta {budget.delta:g}; RDP at order {budget.order:g}, which adds up"
    print_line(f"dataset {budget.dataset_id}: {protects}")
    totals = (
        ("spent", f"{budget.spent:.4f}", f"{budget.shares['spent']:.1%}"),
        ("with what is set aside", f"{budget.committed_to:.4f}", f"{1 - budget.shares['left']:.1%}"),
        ("budget", f"{budget.epsilon:g}", "100.0%"),
    )
    print_table(("", "epsilon", "share of the budget"), totals)
    runs = []
    for run in budget.runs:
        aside = "" if not run.set_aside else f"{run.set_aside_share:.1%}"
        runs.append((run.run_id, str(run.charges), str(run.abandoned), f"{run.share:.1%}", aside, run.first, run.last))
    if runs:
        print_table(("run", "charges", "abandoned", "share", "set aside", "first", "last"), runs)
    if report.planned is not None:
        planned = report.planned
        verdict = "would be admitted" if planned.refused is None else f"would be refused: {planned.refused}"
        print_line(
            f"{planned.scenario} would add {planned.forecast.charges} charges, {planned.forecast.share:.1%} of the "
            f"budget: epsilon {planned.forecast.epsilon_after:.4f} afterwards; it {verdict}"
        )
        others = ", ".join(f"{name.upper()} {value:.4f}" for name, value in planned.forecast.accountants.items())
        print_line(f"the plan alone, for comparison: {others}")
    if report.plot is not None:
        print_line(report.plot)
