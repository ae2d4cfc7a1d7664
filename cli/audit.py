"""``conclave audit``: check ledgers, runs and models."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from conclave.cli.exit_status import ExitStatus
from conclave.cli.options import Json, Overrides, scenario_of
from conclave.cli.output import print_json

app = typer.Typer(help="Check what was spent, and whether the claim holds.", no_args_is_help=True)


@app.command("model")
def audit_model(
    subject: Annotated[str, typer.Argument(help="A scenario, or module:function that returns a model and a batch.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Attack a model's private training: isolation, sensitivity, sampling, noise and more.

    Exit 1 on violation, 2 where a check could not be run.
    """
    is_path = ":" in subject and not Path(subject).exists()
    resolved = None if is_path else scenario_of(subject, overrides or [], None)

    from conclave.audit.model import audit_own, audit_scenario
    from conclave.privacy.audit.subject import verdict_of
    from conclave.report.tables import print_findings

    findings = audit_own(subject) if resolved is None else audit_scenario(resolved)
    print_findings(findings)
    verdict = verdict_of(findings)
    if as_json:
        print_json({"verdict": verdict, "subject": subject, "findings": [asdict(finding) for finding in findings]})
    if verdict != "NOT_REFUTED":
        raise typer.Exit(ExitStatus.VIOLATION if verdict == "VIOLATED" else ExitStatus.BAD_INPUT)


@app.command("ledger")
def audit_ledger(
    ledgers: Annotated[list[Path], typer.Argument(help="Ledgers, their exports (.jsonl), or folders with ledgers.")],
    witness: Annotated[
        Path | None, typer.Option(help="The owner's witness of the one ledger: the ledger must reach it.")
    ] = None,
    receipts: Annotated[
        Path | None, typer.Option(help="A run's receipts.jsonl: every receipt of these ledgers must be on its chain.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Recompute what ledgers spent from their entries; exit 1 if a chain, a price or a budget does not hold."""
    from conclave.audit.ledger import audit_ledgers
    from conclave.report.tables import print_ledger_audits

    audit = audit_ledgers(ledgers, witness=witness, receipts=receipts)
    print_ledger_audits(audit)
    if as_json:
        print_json(audit)
    if audit.verdict == "VIOLATED":
        raise typer.Exit(ExitStatus.VIOLATION)


@app.command("run")
def audit_run(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    ledgers: Annotated[
        list[Path] | None, typer.Option("--ledger", help="A node's ledger or export; a simulation has its own.")
    ] = None,
    also: Annotated[
        list[Path] | None, typer.Option("--also", help="Another run directory, for what the ledgers paid for its plan.")
    ] = None,
    codes: Annotated[
        list[str] | None, typer.Option("--code", help="The hash of another code that nodes may have run.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare a run's receipts with the ledgers and the plan; exit 1 if they tell different stories."""
    from conclave.audit.run import audit_run as compare
    from conclave.report.tables import print_run_audit
    from conclave.server.run_directory import RunDirectory

    others = [RunDirectory.open(path) for path in also or ()]
    audit = compare(RunDirectory.open(run), ledgers or (), also=others, codes=codes or ())
    print_run_audit(audit)
    if as_json:
        print_json(audit)
    if audit.verdict == "VIOLATED":
        raise typer.Exit(ExitStatus.VIOLATION)
