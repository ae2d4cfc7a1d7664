"""What an operator does on a server from afar: ``train``, ``status``, ``stop``; and ``health`` beside it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from conclave.base.errors import BadInputError, UnavailableError
from conclave.cli.exit_status import ExitStatus
from conclave.cli.options import LARGEST_ID, Json, Overrides, SuperLink, scenario_of
from conclave.cli.output import print_json


def health(
    folder: Annotated[Path, typer.Argument(help="The folder of a node or a server that runs on this machine.")],
    as_json: Json = False,
) -> None:
    """Ask a running node or server whether all is well; exit 1 if not, 3 if nobody answers."""
    from conclave.deployment.health import ask_health

    found = ask_health(folder)
    for what, well in found.items():
        typer.echo(f"{what}: {'ok' if well else 'NOT OK'}")
    if as_json:
        print_json(found)
    if not all(found.values()):
        raise typer.Exit(ExitStatus.VIOLATION)


def train(
    superlink: SuperLink,
    scenario: Annotated[str | None, typer.Argument(help="A shipped scenario's name, or a .toml file.")] = None,
    overrides: Overrides = None,
    resume: Annotated[
        str | None, typer.Option(metavar="NAME", help="Go on with this run, named like its folder on the server.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train on real nodes: start a run on a server, follow it, and say where its run directory is."""
    from conclave.deployment.operator.flower_control import Control, follow
    from conclave.deployment.operator.profile import find_operator

    if (scenario is None) == (resume is None):
        raise BadInputError("train: must be given a scenario, or --resume with the name of a run, and not both")
    asked = (
        {"resume": resume}
        if resume is not None
        else {"scenario": scenario_of(scenario or "", overrides or [], None).to_toml()}
    )
    with Control.of(find_operator(superlink)) as control:
        for run in control.runs():
            if not run.finished:
                typer.echo(f"run {run.run_id} is going on; this one waits for it")
        run_id = control.start(asked)
        typer.echo(f"run {run_id}; conclave stop {run_id} ends it, ending this command does not")
        outcome = follow(control, run_id, typer.echo)
    if as_json:
        print_json({"run_id": str(run_id), "status": outcome.sub_status, "details": outcome.details})
    if outcome.sub_status != "completed":
        said = f"run {run_id}: {outcome.details or outcome.sub_status}"
        raise BadInputError(said) if outcome.refused else UnavailableError(said)


def status(superlink: SuperLink, as_json: Json = False) -> None:
    """List a server's nodes and its latest runs."""
    from conclave.deployment.operator.flower_control import Control
    from conclave.deployment.operator.profile import find_operator

    with Control.of(find_operator(superlink)) as control:
        nodes, runs = control.nodes(), control.runs()
    for node_id, state in nodes:
        typer.echo(f"node {node_id}: {state}")
    for run in runs:
        typer.echo(f"run {run.run_id}: {run.status} {run.sub_status} {run.details}".rstrip())
    if as_json:
        print_json({"nodes": {str(n): state for n, state in nodes}, "runs": [asdict(run) for run in runs]})


def stop(
    run_id: Annotated[int, typer.Argument(min=0, max=LARGEST_ID, help="The run, as in status.")], superlink: SuperLink
) -> None:
    """Stop a run on a server. What its rounds cost stays spent; train --resume goes on with it."""
    from conclave.deployment.operator.flower_control import Control
    from conclave.deployment.operator.profile import find_operator

    with Control.of(find_operator(superlink)) as control:
        stopped = control.stop(run_id)
    typer.echo(f"run {run_id}: {'stopped' if stopped else 'was not running'}")
