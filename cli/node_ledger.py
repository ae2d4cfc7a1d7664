"""``conclave node``, an owner's part: the node's folder, its ledger, its budget and its keys."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conclave.base.errors import BadInputError
from conclave.cli.options import Json, NodeFolder, Overrides, scenario_of
from conclave.cli.output import print_json

if TYPE_CHECKING:
    from conclave.privacy.ledger.genesis import Side

app = typer.Typer()

HeldOutSide = Annotated[bool, typer.Option("--held-out", help="The ledger of held-out units, of a node's folder.")]


def _side(held_out: bool) -> Side:
    return "held-out" if held_out else "training"


@app.command("init")
def node_init(
    node: Annotated[Path, typer.Argument(metavar="NODE", help="The node's new folder.")],
    dataset: Annotated[str, typer.Option(help="Your name for the data; one ledger and one budget belong to it.")],
    data: Annotated[Path, typer.Option(help="Where the data lie.")],
    declared_size: Annotated[int, typer.Option(min=1, help="Public: how many units the node says it has.")],
    epsilon: Annotated[float, typer.Option(help="The budget for everything that ever leaves.")],
    delta: Annotated[float, typer.Option(help="The budget's delta, well below 1 / units.")],
    witness: Annotated[Path, typer.Option(help="A file outside the node's disk that keeps the ledger's last head.")],
    unit: Annotated[str, typer.Option(help="Whose participation is protected: record, or group.")] = "record",
    held_out: Annotated[
        float, typer.Option(help="The share of units that never train, to measure models on; with a ledger of its own.")
    ] = 0.0,
    machine: Annotated[str | None, typer.Option(help="A name in place of the system's machine id.")] = None,
    superlink: Annotated[str | None, typer.Option(help="The server to dial, host:port.")] = None,
    ca: Annotated[Path | None, typer.Option(help="The ca.pem that the server's operator gave you.")] = None,
    as_json: Json = False,
) -> None:
    """Create a node's folder: node.toml, keys and ledger. The budget cannot be changed afterwards."""
    from conclave.clients.folder.node_directory import create_node
    from conclave.privacy.accounting.sensible_budget import doubts
    from conclave.privacy.ledger.upkeep.data_place import fingerprint

    if not data.exists():
        raise BadInputError(f"--data {data}: no such file or folder, must be where the data lie")
    created = create_node(
        node,
        dataset={"id": dataset, "data": str(data.absolute()), "unit": unit, "declared_size": declared_size}
        | ({"held_out": held_out} if held_out else {}),
        budget={"epsilon": epsilon, "delta": delta},
        storage={"witness": str(witness.absolute())} | ({} if machine is None else {"machine": machine}),
        server=_connection(superlink, ca),
    )
    typer.echo(f"{node / 'node.toml'}: budget epsilon {epsilon:g} at delta {delta:g}, per {unit}; edit its policy")
    genesis = created.training.genesis
    result = {"node": str(node), "ledger_id": genesis.ledger_id, "public_key": genesis.public_key}
    typer.echo(f"ledger {genesis.ledger_id}, key {genesis.public_key}")
    if created.held_out is not None:
        aside = created.held_out.genesis
        typer.echo(f"ledger {aside.ledger_id} of the {held_out:.0%} held out, key {aside.public_key}, the same budget")
        result |= {"held_out_ledger_id": aside.ledger_id, "held_out_public_key": aside.public_key}
    typer.echo(f"{created.node_key}.pub: the server's operator enrols it")
    # Of private data: on this terminal, and in no document that might be sent.
    typer.echo(
        f"the data's fingerprint is {fingerprint(data)}; for you alone: a node that has the same has the same people"
    )
    for doubt in doubts(epsilon, delta, declared_size):
        typer.echo(f"warning: {doubt}; it cannot be changed later", err=True)
    if as_json:
        print_json(result | {"node_key": f"{created.node_key}.pub"})


def _connection(superlink: str | None, ca: Path | None) -> dict[str, object] | None:
    if (superlink is None) != (ca is None):
        raise BadInputError("--superlink and --ca: must be given both, or neither")
    return None if superlink is None or ca is None else {"address": superlink, "ca": str(ca.absolute())}


@app.command("budget")
def node_budget(
    source: Annotated[Path, typer.Argument(metavar="NODE", help="A node's folder, a ledger, or a ledger's export.")],
    planned: Annotated[
        str | None, typer.Option("--plan", metavar="SCENARIO", help="Say what this scenario would add.")
    ] = None,
    overrides: Overrides = None,
    plot: Annotated[Path | None, typer.Option(help="Write a chart of the spending to this .svg file.")] = None,
    held_out: HeldOutSide = False,
    as_json: Json = False,
) -> None:
    """Show a ledger's budget: spent, set aside, left, what each run took, and what a planned run would add."""
    from conclave.report.budget import budget_report
    from conclave.report.tables import print_budget

    scenario = None if planned is None else scenario_of(planned, overrides or [], None)
    report = budget_report(source, scenario, plot, side=_side(held_out))
    print_budget(report)
    if as_json:
        print_json(report)


@app.command("export")
def node_export(
    source: Annotated[Path, typer.Argument(metavar="NODE", help="A node's folder, or a ledger.")],
    out: Annotated[Path, typer.Argument(help="The file to write, one JSON object a line; must be new.")],
    held_out: HeldOutSide = False,
    as_json: Json = False,
) -> None:
    """Export a ledger: anyone can audit the file, and it helps to recover a lost ledger."""
    from conclave.report.budget import export_ledger

    entries = export_ledger(source, out, side=_side(held_out))
    typer.echo(f"{out}: {entries} entries")
    if as_json:
        print_json({"export": str(out), "entries": entries})


@app.command("rotate-key")
def node_rotate_key(node: NodeFolder, held_out: HeldOutSide = False, as_json: Json = False) -> None:
    """Replace the ledger's signing key, while the node stands still; the old and the new key both sign the change."""
    from conclave.clients.folder.node_directory import NodeDirectory
    from conclave.deployment.host.alone import alone

    directory = NodeDirectory(node)
    with alone(directory.state):  # a running node would go on to sign with the old one, and refuse everything
        public_key = directory.rotate_key(_side(held_out))
    typer.echo(f"the ledger is signed with {public_key} from now on")
    if as_json:
        print_json({"public_key": public_key})


@app.command("restore")
def node_restore(
    node: NodeFolder,
    export: Annotated[Path | None, typer.Option(help="A later export of the same ledger.")] = None,
    held_out: HeldOutSide = False,
    as_json: Json = False,
) -> None:
    """Go on from a restored or moved ledger. What may be missing is charged: all that is left, unless disproved."""
    from conclave.clients.folder.node_directory import NodeDirectory
    from conclave.deployment.host.alone import alone

    directory = NodeDirectory(node)
    with alone(directory.state):
        recovery = directory.restore(export, _side(held_out))
    if recovery.regained:
        typer.echo(f"{recovery.regained} entries were taken over from {export}")
    if recovery.proven:
        typer.echo("the witness proves that nothing is missing; nothing was charged")
    else:
        typer.echo("nothing proves that no entry is missing, so the rest of the budget counts as spent")
    if as_json:
        print_json(recovery)


@app.command("claim")
def node_claim(node: NodeFolder, as_json: Json = False) -> None:
    """Say that data lie where dataset.data names by now: that place is this ledger's too, with the same budget."""
    from conclave.clients.folder.node_directory import NodeDirectory

    directory = NodeDirectory(node)
    directory.claim_data()
    typer.echo(
        f"{directory.data.resolve()}: is this ledger's, like every place where its data lay; the budget is the same"
    )
    if as_json:
        print_json({"data": str(directory.data.resolve())})
