"""The command line: every command of Conclave in one place.

Heavy libraries are imported inside the commands that need them, so that ``conclave --help`` answers at once; those of
training once a command's input has been read, so that a misspelt scenario does not wait for them either.
"""

from __future__ import annotations

import io
import json
import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from conclave.privacy.ledger.entry import Side
    from conclave.server.scenario import Scenario
    from conclave.simulations.baselines import BaselineKind

EXIT_VIOLATION = 1
EXIT_TRY_AGAIN = 1
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
_LARGEST_ID = 2**64 - 1  # of Flower's nodes and runs

app = typer.Typer(
    help="Train mixture-of-experts models across organisations, under differential privacy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
audit_app = typer.Typer(help="Check what was spent, and whether the claim holds.", no_args_is_help=True)
app.add_typer(audit_app, name="audit")
node_app = typer.Typer(help="Keep a node: its ledger, its budget, its keys.", no_args_is_help=True)
app.add_typer(node_app, name="node")

server_app = typer.Typer(help="Run a server: its certificates, its proxy, its nodes.", no_args_is_help=True)
app.add_typer(server_app, name="server")

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. privacy.epsilon=3.")
]
Json = Annotated[bool, typer.Option("--json", help="End with one JSON object on a line of its own.")]


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    _refuse_arguments_that_say_nothing(sys.argv[1:])
    if version:
        from importlib.metadata import version as installed_version

        typer.echo(f"conclave {installed_version('conclave-moe')}")
        raise typer.Exit


def _refuse_arguments_that_say_nothing(arguments: list[str]) -> None:
    """Refuse what no document could hold and no terminal show; and what is empty: as a path it is the folder here."""
    for place, argument in enumerate(arguments, start=1):
        if not argument or (argument.startswith("--") and argument.find("=") == len(argument) - 1):
            from conclave.base.errors import BadInputError

            name = argument or f"argument {place}"
            raise BadInputError(f"{name}: is empty, must be a value; perhaps a variable of the shell is not set")
    try:
        "\n".join(arguments).encode()
    except UnicodeEncodeError as error:
        from conclave.base.errors import BadInputError

        strange = next(argument for argument in arguments if error.object[error.start] in argument)
        raise BadInputError(f"argument {strange!r}: is no text in UTF-8, must be one") from error


@app.command()
def simulate(
    scenario: Annotated[
        str | None, typer.Argument(help="A shipped scenario's name, or a .toml file; digits if not given.")
    ] = None,
    overrides: Overrides = None,
    seed: Annotated[int | None, typer.Option(help="Shorthand for --set seed=N.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run directory; must be new or empty.")] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Continue the run in this directory after its last round.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="What to compare with: central (all records on one node), alone (each node by itself), dense-total or "
            "dense-active (one dense network with as many parameters in all, or active for a token)."
        ),
    ] = None,
    engine: Annotated[str, typer.Option(help="inline, or ray: Flower's own simulation runtime.")] = "inline",
    workers: Annotated[int, typer.Option(min=1, max=256, help="Processes that run nodes, one thread each.")] = 1,
    threads: Annotated[int, typer.Option(min=1, max=256, help="Torch threads of this process.")] = 1,
    as_json: Json = False,
) -> None:
    """Run a whole federation on this machine and write a run directory with a report."""
    kind = _engine(engine)
    if resume is not None:
        _refuse_beside_resume(scenario=scenario, set=overrides, seed=seed, out=out, baseline=baseline)

    from conclave.server.run_directory import RunDirectory

    if resume is None:
        resolved = _scenario(scenario or "digits", overrides or [], seed)
    else:
        resolved = _with_own_code(RunDirectory.open(resume).scenario)

    from conclave.report.report import write_report
    from conclave.report.tables import print_summary
    from conclave.simulations.baseline_run import run_baseline
    from conclave.simulations.simulate import simulate as run_simulation

    if baseline is not None:
        other = _baseline(baseline)
        runs = resolved.nodes if other == "alone" else 1
        with _progress(resolved.federation.rounds * runs) as advance:
            summary = run_baseline(
                resolved, other, out, advance, engine=kind, workers=workers, threads=threads, on_run=write_report
            )
        report_path = summary.run / ("node-*/report.html" if other == "alone" else "report.html")
    else:
        run = RunDirectory.create(resolved, out) if resume is None else RunDirectory.open(resume)
        with _progress(resolved.federation.rounds) as advance:
            summary = run_simulation(resolved, run, advance, engine=kind, workers=workers, threads=threads)
        report_path = write_report(run)
    print_summary(resolved, summary, report_path)
    _warn_of_budget(resolved)
    if as_json:
        result = {name: value for name, value in asdict(summary).items() if value is not None and name != "run"}
        if summary.baseline is not None:
            result["baseline"] = summary.baseline.model_dump(exclude_defaults=True)
        _print_json({**result, "run": str(summary.run)})


@app.command()
def plan(
    scenario: Annotated[str, typer.Argument(help="A shipped scenario's name, or a .toml file.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Show what a scenario will cost before anything runs: noise, epsilon, bytes, steps, expected time."""
    resolved = _scenario(scenario, overrides or [], None)

    from conclave.report.tables import print_plan
    from conclave.simulations.estimate import estimate_simulated

    estimate = estimate_simulated(resolved)
    print_plan(estimate)
    _warn_of_budget(resolved)
    if as_json:
        _print_json(asdict(estimate))


@app.command()
def model(
    scenario: Annotated[str, typer.Argument(help="A shipped scenario's name, or a .toml file.")],
    overrides: Overrides = None,
    plot: Annotated[Path | None, typer.Option(help="Draw who holds which experts to this .svg file.")] = None,
    as_json: Json = False,
) -> None:
    """Show a scenario's model: parameters, active ones and operations for a token, traffic, who holds what."""
    from conclave.report.model_card import model_card
    from conclave.report.tables import print_model_card

    card = model_card(_scenario(scenario, overrides or [], None), plot)
    print_model_card(card)
    if as_json:
        _print_json(card)


@app.command()
def scenarios(as_json: Json = False) -> None:
    """List the scenarios that come with Conclave."""
    from conclave.server.scenario import read_scenario
    from conclave.simulations.shipped import shipped

    found = {name: read_scenario(path) for name, path in shipped().items()}
    for name, item in found.items():
        typer.echo(f"{name:<16} {item.description}")
    if as_json:
        _print_json({"scenarios": {name: item.description for name, item in found.items()}})


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run directory.")], as_json: Json = False) -> None:
    """Render a run's report again, from its directory alone."""
    from conclave.report.report import write_report
    from conclave.server.run_directory import RunDirectory

    path = write_report(RunDirectory.open(run))
    typer.echo(str(path))
    if as_json:
        _print_json({"report": str(path)})


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="A model folder or a run directory.")],
    source: Annotated[
        str, typer.Argument(metavar="INPUT", help="An image, a .npy array, digits:N or mnist:N; text: a prompt.")
    ],
    max_bytes: Annotated[int, typer.Option(help="Text: how many bytes to generate.")] = 128,
    temperature: Annotated[float, typer.Option(help="Text: below 1 is safer, above 1 wilder.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Text: fixes the draw.")] = 0,
    as_json: Json = False,
) -> None:
    """Predict with a trained model: classify an image, or continue a text."""
    from conclave.report.predict import Continuation
    from conclave.report.predict import predict as run_prediction

    prediction = run_prediction(model, source, max_bytes=max_bytes, temperature=temperature, seed=seed)
    if isinstance(prediction, Continuation):
        typer.echo(source + prediction.text)
    else:
        truth = "" if prediction.truth is None else f" (truth {prediction.truth})"
        typer.echo(f"{prediction.label} with probability {prediction.probability:.3f}{truth}")
    if as_json:
        _print_json(asdict(prediction))


@audit_app.command("model")
def audit_model(
    subject: Annotated[str, typer.Argument(help="A scenario, or module:function that returns a model and a batch.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Attack a model's private training: isolation, sensitivity, sampling, noise and more.

    Exit 1 on violation, 2 where a check could not be run.
    """
    is_path = ":" in subject and not Path(subject).exists()
    resolved = None if is_path else _scenario(subject, overrides or [], None)

    from conclave.audit.model import audit_own, audit_scenario
    from conclave.privacy.audit.subject import verdict_of
    from conclave.report.tables import print_findings

    findings = audit_own(subject) if resolved is None else audit_scenario(resolved)
    print_findings(findings)
    verdict = verdict_of(findings)
    if as_json:
        _print_json({"verdict": verdict, "subject": subject, "findings": [asdict(finding) for finding in findings]})
    if verdict != "NOT_REFUTED":
        raise typer.Exit(EXIT_VIOLATION if verdict == "VIOLATED" else EXIT_BAD_INPUT)


@audit_app.command("ledger")
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
        _print_json(audit)
    if audit.verdict == "VIOLATED":
        raise typer.Exit(EXIT_VIOLATION)


@audit_app.command("run")
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
        _print_json(audit)
    if audit.verdict == "VIOLATED":
        raise typer.Exit(EXIT_VIOLATION)


HeldOutSide = Annotated[bool, typer.Option("--held-out", help="The ledger of held-out units, of a node's folder.")]


def _side(held_out: bool) -> Side:
    return "held-out" if held_out else "training"


NodeFolder = Annotated[Path, typer.Argument(metavar="NODE", help="The node's folder, which holds node.toml.")]


@node_app.command("init")
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
    from conclave.base.errors import BadInputError
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
        _print_json(result | {"node_key": f"{created.node_key}.pub"})


def _connection(superlink: str | None, ca: Path | None) -> dict[str, object] | None:
    from conclave.base.errors import BadInputError

    if (superlink is None) != (ca is None):
        raise BadInputError("--superlink and --ca: must be given both, or neither")
    return None if superlink is None or ca is None else {"address": superlink, "ca": str(ca.absolute())}


@node_app.command("budget")
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

    scenario = None if planned is None else _scenario(planned, overrides or [], None)
    report = budget_report(source, scenario, plot, side=_side(held_out))
    print_budget(report)
    if as_json:
        _print_json(report)


@node_app.command("export")
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
        _print_json({"export": str(out), "entries": entries})


@node_app.command("rotate-key")
def node_rotate_key(node: NodeFolder, held_out: HeldOutSide = False, as_json: Json = False) -> None:
    """Replace the ledger's signing key, while the node stands still; the old and the new key both sign the change."""
    from conclave.clients.folder.node_directory import NodeDirectory
    from conclave.deployment.host.alone import alone

    directory = NodeDirectory(node)
    with alone(directory.state):  # a running node would go on to sign with the old one, and refuse everything
        public_key = directory.rotate_key(_side(held_out))
    typer.echo(f"the ledger is signed with {public_key} from now on")
    if as_json:
        _print_json({"public_key": public_key})


@node_app.command("restore")
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
        _print_json(recovery)


@node_app.command("claim")
def node_claim(node: NodeFolder, as_json: Json = False) -> None:
    """Say that data lie where dataset.data names by now: that place is this ledger's too, with the same budget."""
    from conclave.clients.folder.node_directory import NodeDirectory

    directory = NodeDirectory(node)
    directory.claim_data()
    typer.echo(
        f"{directory.data.resolve()}: is this ledger's, like every place where its data lay; the budget is the same"
    )
    if as_json:
        _print_json({"data": str(directory.data.resolve())})


@node_app.command("start")
def node_start(node: NodeFolder) -> None:
    """Answer the server's messages beside the private data, until interrupted."""
    from conclave.clients.folder.node_directory import NodeDirectory

    directory = NodeDirectory(node)

    from conclave.deployment.host.logs import log_to_terminal
    from conclave.deployment.node.process import start_node

    log_to_terminal(directory.config.monitoring.log_format)
    with _to_be_started_again():
        start_node(directory)


@node_app.command("check")
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
    planned = None if scenario is None else _scenario(scenario, overrides or [], None)

    from conclave.deployment.node.check import check_node

    checks = check_node(directory, planned)
    for check in checks:
        typer.echo(f"{check.what:<12} {'ok: ' + check.found if check.problem is None else 'NOT OK: ' + check.problem}")
    if as_json:
        _print_json({"checks": [asdict(check) for check in checks]})
    if any(check.problem for check in checks):
        raise typer.Exit(EXIT_VIOLATION)


@node_app.command("backup")
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
        _print_json({"backup": str(out), "files": names})


ServiceUser = Annotated[str, typer.Option("--user", help="Whom the process runs as.")]


@node_app.command("unit")
def node_unit(node: NodeFolder, user: ServiceUser = "conclave") -> None:
    """Print a unit for systemd, which starts the node with its machine."""
    from conclave.clients.folder.node_directory import NodeDirectory
    from conclave.deployment import service_unit

    typer.echo(service_unit.node_unit(NodeDirectory(node), user), nl=False)


@node_app.command("approve")
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
        _print_json({state: [{"plan": item.hash, "scenario": item.scenario} for item in found]})


@node_app.command("pause")
def node_pause(node: NodeFolder) -> None:
    """Refuse every request from now on, also in the middle of a run."""
    from conclave.clients.approvals import Approvals
    from conclave.clients.folder.node_directory import NodeDirectory

    Approvals(NodeDirectory(node).plans).pause()
    typer.echo("paused: conclave node resume goes on")


@node_app.command("resume")
def node_resume(node: NodeFolder) -> None:
    """Answer again."""
    from conclave.clients.approvals import Approvals
    from conclave.clients.folder.node_directory import NodeDirectory

    Approvals(NodeDirectory(node).plans).resume()
    typer.echo("answering")


@node_app.command("close")
def node_close(
    node: NodeFolder, run_id: Annotated[str, typer.Argument(help="The run, as in node budget.")], as_json: Json = False
) -> None:
    """Give back what is set aside for a run that will not go on; it is not admitted again."""
    from conclave.clients.folder.node_directory import NodeDirectory

    closed = NodeDirectory(node).close_plans(run_id)
    typer.echo(f"run {run_id}: {closed} open plan(s) closed")
    if as_json:
        _print_json({"run_id": run_id, "closed": closed})


ServerFolder = Annotated[Path, typer.Argument(metavar="SERVER", help="The server's folder, which holds server.toml.")]
Days = Annotated[int, typer.Option(min=1, max=7300, help="For how long the certificates are good.")]
SuperLink = Annotated[str, typer.Option("--superlink", help="An operator's folder, or its name in ~/.config/conclave.")]


@server_app.command("init")
def server_init(
    server: Annotated[Path, typer.Argument(metavar="SERVER", help="The server's new folder.")],
    host: Annotated[list[str], typer.Option(help="A name or address under which nodes reach it; may be repeated.")],
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Where nodes and operators connect.")] = 9443,
    days: Days = 825,
    as_json: Json = False,
) -> None:
    """Create a server's folder: server.toml, a certificate authority, the server's certificate, an operator's."""
    from conclave.deployment.server.config import parse_server_config
    from conclave.deployment.server.directory import ServerDirectory

    parse_server_config({"hosts": host, "port": port}, where=str(server))  # before anything is written
    created = ServerDirectory.create(server, host, port=port, days=days)
    typer.echo(f"{server / 'server.toml'}: listens on port {port} as {', '.join(host)}")
    typer.echo(f"{server / 'operator'}: what an operator needs; keep it secret")
    typer.echo(f"{server / 'operator' / 'ca.pem'}: give this file to every node")
    if as_json:
        _print_json({"server": str(server), "operator": str(created.operator), "ca": str(created.operator / "ca.pem")})


@server_app.command("start")
def server_start(server: ServerFolder) -> None:
    """Serve nodes and operators, until interrupted."""
    from conclave.deployment.host.logs import log_to_terminal
    from conclave.deployment.server.directory import ServerDirectory
    from conclave.deployment.server.process import start_server

    directory = ServerDirectory(server)
    log_to_terminal(directory.config.monitoring.log_format)
    with _to_be_started_again():
        start_server(directory)


@server_app.command("unit")
def server_unit(server: ServerFolder, user: ServiceUser = "conclave") -> None:
    """Print a unit for systemd, which starts the server with its machine."""
    from conclave.deployment import service_unit
    from conclave.deployment.server.directory import ServerDirectory

    typer.echo(service_unit.server_unit(ServerDirectory(server), user), nl=False)


@server_app.command("enrol")
def server_enrol(
    public_key: Annotated[Path, typer.Argument(help="The node's public key (.pub), as node init made it.")],
    superlink: SuperLink,
    as_json: Json = False,
) -> None:
    """Let a node connect."""
    from conclave.deployment.operator.flower_control import Control
    from conclave.deployment.operator.profile import find_operator

    with Control.of(find_operator(superlink)) as control:
        node_id = control.register(public_key)
    typer.echo(f"{public_key} may connect, as Flower's node {node_id}")
    if as_json:
        _print_json({"node_id": str(node_id)})


@server_app.command("remove")
def server_remove(
    node_id: Annotated[
        int, typer.Argument(metavar="NODE", min=0, max=_LARGEST_ID, help="Flower's id of the node, as in status.")
    ],
    superlink: SuperLink,
) -> None:
    """Let a node connect no more: its key was lost, or it has left."""
    from conclave.deployment.operator.flower_control import Control
    from conclave.deployment.operator.profile import find_operator

    with Control.of(find_operator(superlink)) as control:
        control.unregister(node_id)
    typer.echo(f"node {node_id} may connect no more")


@server_app.command("renew")
def server_renew(server: ServerFolder, days: Days = 825) -> None:
    """Replace the server's certificate, for the hosts in server.toml; a running server takes it at once."""
    from conclave.deployment.server.directory import ServerDirectory
    from conclave.deployment.server.proxy import reload_proxy

    directory = ServerDirectory(server)
    directory.renew(days=days)
    when = "in use" if reload_proxy(directory.path) else "in use when the server starts"
    typer.echo(f"{directory.tls / 'server.pem'}: good for {days} days, {when}")


@server_app.command("operator")
def server_operator(
    server: ServerFolder,
    name: Annotated[str, typer.Argument(help="The operator's name.")],
    out: Annotated[Path, typer.Argument(help="The new folder to write; give it to the operator over a safe way.")],
    days: Days = 825,
) -> None:
    """Let one more operator register nodes and start runs."""
    from conclave.deployment.server.directory import ServerDirectory

    ServerDirectory(server).add_operator(name, out, days=days)
    typer.echo(f"{out}: what operator {name} needs; keep it secret")


@server_app.command("revoke")
def server_revoke(
    server: ServerFolder, name: Annotated[str, typer.Argument(help="The operator's name; the first is 'operator'.")]
) -> None:
    """Refuse an operator's certificate from now on; a running server does so at once."""
    from conclave.deployment.server.directory import ServerDirectory
    from conclave.deployment.server.proxy import reload_proxy

    directory = ServerDirectory(server)
    directory.revoke_operator(name)
    when = "now" if reload_proxy(directory.path) else "when the server starts"
    typer.echo(f"operator {name}: refused, {when}")


@app.command()
def health(
    folder: Annotated[Path, typer.Argument(help="The folder of a node or a server that runs on this machine.")],
    as_json: Json = False,
) -> None:
    """Ask a running node or server whether all is well; exit 1 if not, 2 if nobody answers."""
    from conclave.deployment.health import ask_health

    found = ask_health(folder)
    for what, well in found.items():
        typer.echo(f"{what}: {'ok' if well else 'NOT OK'}")
    if as_json:
        _print_json(found)
    if not all(found.values()):
        raise typer.Exit(EXIT_VIOLATION)


@app.command()
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
    from conclave.base.errors import BadInputError, RunFailedError
    from conclave.deployment.operator.flower_control import Control
    from conclave.deployment.operator.following import follow
    from conclave.deployment.operator.profile import find_operator

    if (scenario is None) == (resume is None):
        raise BadInputError("train: must be given a scenario, or --resume with the name of a run, and not both")
    asked = (
        {"resume": resume}
        if resume is not None
        else {"scenario": _scenario(scenario or "", overrides or [], None).to_toml()}
    )
    with Control.of(find_operator(superlink)) as control:
        for run in control.runs():
            if not run.finished:
                typer.echo(f"run {run.run_id} is going on; this one waits for it")
        run_id = control.start(asked)
        typer.echo(f"run {run_id}; conclave stop {run_id} ends it, ending this command does not")
        outcome = follow(control, run_id, typer.echo)
    if as_json:
        _print_json({"run_id": str(run_id), "status": outcome.sub_status, "details": outcome.details})
    if outcome.sub_status != "completed":
        if outcome.details.startswith(RunFailedError.BEGINNING):
            sys.stderr.write(f"conclave: run {run_id}: {outcome.details}\n")
            raise typer.Exit(EXIT_FAILED)
        raise BadInputError(f"run {run_id}: {outcome.details or outcome.sub_status}")


@app.command()
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
        _print_json({"nodes": {str(n): state for n, state in nodes}, "runs": [asdict(run) for run in runs]})


@app.command()
def stop(
    run_id: Annotated[int, typer.Argument(min=0, max=_LARGEST_ID, help="The run, as in status.")], superlink: SuperLink
) -> None:
    """Stop a run on a server. What its rounds cost stays spent; train --resume goes on with it."""
    from conclave.deployment.operator.flower_control import Control
    from conclave.deployment.operator.profile import find_operator

    with Control.of(find_operator(superlink)) as control:
        stopped = control.stop(run_id)
    typer.echo(f"run {run_id}: {'stopped' if stopped else 'was not running'}")


@app.command()
def schema(
    name: Annotated[str | None, typer.Argument(help="Which document; without it, all names.")] = None,
    as_json: Json = False,
) -> None:
    """Print the JSON Schema of a document that Conclave writes."""
    from conclave.report.schemas import SCHEMAS, schema_of

    if name is not None:
        typer.echo(json.dumps(schema_of(name), indent=None if as_json else 2))
        return
    for known in SCHEMAS:
        typer.echo(known)
    if as_json:
        _print_json({"schemas": list(SCHEMAS)})


def _engine(name: str) -> Literal["inline", "ray"]:
    from conclave.base.errors import BadInputError

    if name == "inline":
        return "inline"
    if name == "ray":
        return "ray"
    raise BadInputError(f"--engine is {name}, must be inline or ray")


def _baseline(name: str) -> BaselineKind:
    from conclave.base.errors import BadInputError
    from conclave.simulations.baselines import KINDS

    for kind in KINDS:
        if kind == name:
            return kind
    raise BadInputError(f"--baseline is {name}, must be one of {', '.join(KINDS)}")


def _refuse_beside_resume(**given: object) -> None:
    from conclave.base.errors import BadInputError

    for name, value in given.items():
        if value is not None and value != []:
            option = "the scenario argument" if name == "scenario" else f"--{name}"
            raise BadInputError(f"--resume: cannot be combined with {option}, the run's own scenario continues")


def _scenario(name: str, overrides: list[str], seed: int | None) -> Scenario:
    from conclave.server.scenario import parse_override, read_scenario
    from conclave.simulations.shipped import find

    changes = dict(parse_override(text) for text in overrides)
    if seed is not None:
        changes["seed"] = seed
    return _with_own_code(read_scenario(find(name), changes))


def _warn_of_budget(scenario: Scenario) -> None:
    from conclave.simulations.estimate import budget_doubts

    for doubt in budget_doubts(scenario):
        typer.echo(f"warning: {doubt}; a real node of that size would refuse or warn", err=True)


def _with_own_code(scenario: Scenario) -> Scenario:
    """Let a scenario's own model be found where the caller is."""
    if scenario.model.source is not None:
        sys.path.append(str(Path.cwd()))
    return scenario


class _progress:  # noqa: N801  (used like a function)
    """A progress bar over rounds, shown on a terminal only."""

    def __init__(self, rounds: int) -> None:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self._bar = Progress(console=console, disable=not console.is_terminal, transient=True)
        self._task = self._bar.add_task("rounds", total=rounds)

    def __enter__(self) -> Any:
        self._bar.__enter__()
        return lambda round_number: self._bar.update(self._task, completed=round_number)

    def __exit__(self, *error: object) -> None:
        self._bar.__exit__(*error)  # type: ignore[arg-type]


@contextmanager
def _to_be_started_again() -> Iterator[None]:
    """Let systemd start a process again that a full disk, say, has ended: its unit does not where input was bad."""
    try:
        yield
    except OSError as error:
        _say(_said_by_system(error))
        raise typer.Exit(EXIT_TRY_AGAIN) from error


def _said_by_system(error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    return reason if error.filename is None else f"{error.filename}: {reason}"


def _print_json(document: Any) -> None:
    """Print one JSON object on a line of its own: a mapping, or a document that has a published schema."""
    if not isinstance(document, dict):
        from conclave.report.schemas import to_json

        document = to_json(document)
    typer.echo(json.dumps(_spelled(document), allow_nan=False))


def _spelled(value: Any) -> Any:
    """Spell what JSON has no number for: infinity as the ledger does, and what a model that diverged comes to."""
    if isinstance(value, dict):
        return {key: _spelled(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_spelled(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _say(sentence: str) -> None:
    """Write one line, whatever names the sentence repeats: a file's may have ends of lines in it."""
    from conclave.report.printing import on_one_line

    if sys.stderr is not None:  # it may be closed
        sys.stderr.write(f"conclave: {on_one_line(sentence)}\n")


def main() -> None:
    """Run the command line: bad input, or what the system does not let it do, is one sentence and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal has no character for is spelled out, not fatal
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        app()
    except ValueError as error:
        from conclave.base.errors import BadInputError

        if not isinstance(error, BadInputError):
            raise
        _say(str(error))
        sys.exit(EXIT_BAD_INPUT)
    except RuntimeError as error:
        from conclave.base.errors import RunFailedError

        if not isinstance(error, RunFailedError):
            raise
        _say(str(error))
        sys.exit(EXIT_FAILED)
    except OSError as error:  # a closed pipe is no one's mistake: click has ended by then, without a word
        _say(_said_by_system(error))
        sys.exit(EXIT_BAD_INPUT)


if __name__ == "__main__":
    main()
