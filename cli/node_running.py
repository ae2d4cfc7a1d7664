"""``conclave node``, the node at work: start and check it, say what it may do, and stop that."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from conclave.cli.exit_status import ExitStatus, to_be_started_again
from conclave.cli.options import Json, NodeFolder, Overrides, ServiceUser, scenario_of
from conclave.cli.output import print_json

app = typer.Typer()


@app.command("start")
def node_start(node: NodeFolder) -> None:
    """Answer the server's messages beside the private data, until interrupted."""
    from conclave.clients.folder.node_directory import NodeDirectory

    directory = NodeDirectory(node)

    from conclave.deployment.host.logs import log_to_terminal
    from conclave.deployment.node.process import start_node

    log_to_terminal(directory.config.monitoring.log_format)
    with to_be_started_again():
        start_node(directory)


@app.command("check")
def node_check(
    node: NodeFolder,
    scenario: Annotated[
        str | None, typer.Option(help="Whether data, policy and budget suit this scenario is looked at too.")
    ] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Look at everything that a node needs before its first round; exit 1 if something is not in order."""
    from conclave.clients.folder.node_directory import NodeDirectory

    directory = NodeDirectory(node)
    planned = None if scenario is None else scenario_of(scenario, overrides or [], None)

    from conclave.deployment.node.check import check_node

    checks = check_node(directory, planned)
    for check in checks:
        typer.echo(f"{check.what:<12} {'ok: ' + check.found if check.problem is None else 'NOT OK: ' + check.problem}")
    if as_json:
        print_json({"checks": [asdict(check) for check in checks]})
    if any(check.problem for check in checks):
        raise typer.Exit(ExitStatus.VIOLATION)


@app.command("backup")
def node_backup(
    node: NodeFolder,
    out: Annotated[Path, typer.Argument(help="The tar file to write; must be new.")],
    as_json: Json = False,
) -> None:
    """Back up ledgers, keys and approvals, also while the node runs; the data are not in it."""
    from conclave.clients.folder.backup import back_up
    from conclave.clients.folder.node_directory import NodeDirectory

    names = back_up(NodeDirectory(node), out)
    typer.echo(f"{out}: {len(names)} files, with keys: keep it as safe as the node")
    if as_json:
        print_json({"backup": str(out), "files": names})


@app.command("unit")
def node_unit(node: NodeFolder, user: ServiceUser = "conclave") -> None:
    """Print a unit for systemd, which starts the node with its machine."""
    from conclave.clients.folder.node_directory import NodeDirectory
    from conclave.deployment import service_unit

    typer.echo(service_unit.node_unit(NodeDirectory(node), user), nl=False)


@app.command("approve")
def node_approve(
    node: NodeFolder,
    plan_hash: Annotated[
        str | None,
        typer.Argument(metavar="[PLAN]", help="The plan's hash, or how it begins; lists what waits if absent."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Approve one run of a plan that a server asked for, within policy and budget."""
    from conclave.clients.approvals import Approvals, released
    from conclave.clients.folder.node_directory import NodeDirectory

    approvals = Approvals(NodeDirectory(node).plans)
    found = approvals.waiting() if plan_hash is None else [approvals.approve(plan_hash)]
    state = "waits" if plan_hash is None else "approved"
    for item in found:
        plan = item.plan
        typer.echo(
            f"{item.hash} {state}: scenario {item.scenario!r}, {plan.rounds} rounds of {plan.training.steps} steps, "
            f"epsilon {plan.privacy.epsilon:g} at delta {plan.privacy.delta:g}, releases {', '.join(released(plan))}"
        )
    if not found:
        typer.echo("no plan waits")
    if as_json:
        print_json({state: [{"plan": item.hash, "scenario": item.scenario} for item in found]})


@app.command("pause")
def node_pause(node: NodeFolder) -> None:
    """Refuse every request from now on, also in the middle of a run."""
    from conclave.clients.approvals import Approvals
    from conclave.clients.folder.node_directory import NodeDirectory

    Approvals(NodeDirectory(node).plans).pause()
    typer.echo("paused: conclave node resume goes on")


@app.command("resume")
def node_resume(node: NodeFolder) -> None:
    """Answer again."""
    from conclave.clients.approvals import Approvals
    from conclave.clients.folder.node_directory import NodeDirectory

    Approvals(NodeDirectory(node).plans).resume()
    typer.echo("answering")


@app.command("close")
def node_close(
    node: NodeFolder, run_id: Annotated[str, typer.Argument(help="The run, as in node budget.")], as_json: Json = False
) -> None:
    """Give back what is set aside for a run that will not go on; it is not admitted again."""
    from conclave.clients.folder.node_directory import NodeDirectory

    closed = NodeDirectory(node).close_plans(run_id)
    typer.echo(f"run {run_id}: {closed} open plan(s) closed")
    if as_json:
        print_json({"run_id": run_id, "closed": closed})
