"""The command line: every command of Conclave in one place.

Heavy libraries are imported inside the commands that need them, so that ``conclave --help`` answers at once.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from server.scenario import Scenario

EXIT_VIOLATION = 1
EXIT_BAD_INPUT = 2

app = typer.Typer(
    help="Train mixture-of-experts models across organisations, under differential privacy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
audit_app = typer.Typer(help="Check what was spent, and whether the claim holds.", no_args_is_help=True)
app.add_typer(audit_app, name="audit")

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. privacy.epsilon=3.")
]
Json = Annotated[bool, typer.Option("--json", help="End with one JSON object on a line of its own.")]


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed_version

        typer.echo(f"conclave {installed_version('conclave-moe')}")
        raise typer.Exit


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
    engine: Annotated[str, typer.Option(help="inline, or ray: Flower's own simulation runtime.")] = "inline",
    workers: Annotated[int, typer.Option(min=1, max=256, help="Processes that run nodes, one thread each.")] = 1,
    threads: Annotated[int, typer.Option(min=1, max=256, help="Torch threads of this process.")] = 1,
    as_json: Json = False,
) -> None:
    """Run a whole federation on this machine and write a run directory with a report."""
    from server.run_directory import RunDirectory
    from simulations.report import write_report
    from simulations.simulate import simulate as run_simulation
    from simulations.tables import print_summary

    kind = _engine(engine)
    if resume is None:
        resolved = _scenario(scenario or "digits", overrides or [], seed)
        run = RunDirectory.create(resolved, out)
    else:
        _refuse_beside_resume(scenario=scenario, set=overrides, seed=seed, out=out)
        run = RunDirectory.open(resume)
        resolved = run.scenario
    with _progress(resolved.federation.rounds) as advance:
        summary = run_simulation(resolved, run, advance, engine=kind, workers=workers, threads=threads)
    report_path = write_report(run)
    print_summary(resolved, summary, report_path)
    if as_json:
        result = {name: value for name, value in asdict(summary).items() if value is not None}
        _print_json({**result, "epsilon": _finite(summary.epsilon), "run": str(summary.run)})


@app.command()
def plan(
    scenario: Annotated[str, typer.Argument(help="A shipped scenario's name, or a .toml file.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Show what a scenario will cost before anything runs: noise, epsilon, bytes, steps, expected time."""
    from simulations.plan import plan as work_out
    from simulations.tables import print_plan

    estimate = work_out(_scenario(scenario, overrides or [], None))
    print_plan(estimate)
    if as_json:
        _print_json({**asdict(estimate), "epsilon": _finite(estimate.epsilon)})


@app.command()
def scenarios(as_json: Json = False) -> None:
    """List the scenarios that come with Conclave."""
    from data.shipped_scenarios import shipped
    from server.scenario import read_scenario

    found = {name: read_scenario(path) for name, path in shipped().items()}
    for name, item in found.items():
        typer.echo(f"{name:<16} {item.description}")
    if as_json:
        _print_json({"scenarios": {name: item.description for name, item in found.items()}})


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run directory.")], as_json: Json = False) -> None:
    """Render a run's report again, from its directory alone."""
    from server.run_directory import RunDirectory
    from simulations.report import write_report

    path = write_report(RunDirectory.open(run))
    typer.echo(str(path))
    if as_json:
        _print_json({"report": str(path)})


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="A model folder or a run directory.")],
    source: Annotated[
        str, typer.Argument(metavar="INPUT", help="An image, a .npy array or digits:N; for a text model, a prompt.")
    ],
    max_bytes: Annotated[int, typer.Option(help="Text: how many bytes to generate.")] = 128,
    temperature: Annotated[float, typer.Option(help="Text: below 1 is safer, above 1 wilder.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Text: fixes the draw.")] = 0,
    as_json: Json = False,
) -> None:
    """Predict with a trained model: classify an image, or continue a text."""
    from simulations.predict import Continuation
    from simulations.predict import predict as run_prediction

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
    """Attack a model's private training: isolation, sensitivity, sampling, noise and more; exit 1 on violation."""
    from simulations.audit_model import audit_own, audit_scenario
    from simulations.tables import print_findings

    is_path = ":" in subject and not Path(subject).exists()
    findings = audit_own(subject) if is_path else audit_scenario(_scenario(subject, overrides or [], None))
    print_findings(findings)
    violated = any(finding.violation for finding in findings)
    if as_json:
        verdict = "VIOLATED" if violated else "NOT_REFUTED"
        _print_json({"verdict": verdict, "subject": subject, "findings": [asdict(finding) for finding in findings]})
    if violated:
        raise typer.Exit(EXIT_VIOLATION)


@audit_app.command("ledger")
def audit_ledger(
    ledgers: Annotated[list[Path], typer.Argument(help="Ledger files, or folders that hold them.")],
    as_json: Json = False,
) -> None:
    """Recompute what ledgers spent from their entries; exit 1 if a chain, a price or a budget does not hold."""
    from privacy.ledger.reading import open_history
    from privacy.ledger.verification import audit_history
    from simulations.tables import print_ledger_audits

    results = {str(path): audit_history(open_history(path)) for path in _ledger_files(ledgers)}
    print_ledger_audits(results)
    violated = any(result.findings for result in results.values())
    if as_json:
        rows = {path: {**asdict(result), "epsilon": _finite(result.epsilon)} for path, result in results.items()}
        _print_json({"verdict": "VIOLATED" if violated else "NOT_REFUTED", "ledgers": rows})
    if violated:
        raise typer.Exit(EXIT_VIOLATION)


def _engine(name: str) -> Literal["inline", "ray"]:
    from model.errors import BadInputError

    if name == "inline":
        return "inline"
    if name == "ray":
        return "ray"
    raise BadInputError(f"--engine is {name}, must be inline or ray")


def _refuse_beside_resume(**given: object) -> None:
    from model.errors import BadInputError

    for name, value in given.items():
        if value is not None and value != []:
            option = "the scenario argument" if name == "scenario" else f"--{name}"
            raise BadInputError(f"--resume: cannot be combined with {option}, the run's own scenario continues")


def _scenario(name: str, overrides: list[str], seed: int | None) -> Scenario:
    from data.shipped_scenarios import find
    from server.scenario import parse_override, read_scenario

    changes = dict(parse_override(text) for text in overrides)
    if seed is not None:
        changes["seed"] = seed
    return read_scenario(find(name), changes)


def _ledger_files(given: list[Path]) -> list[Path]:
    from model.errors import BadInputError

    files: list[Path] = []
    for path in given:
        found = sorted(path.rglob("*.db")) if path.is_dir() else [path]
        if not found:
            raise BadInputError(f"{path}: holds no ledger (*.db), must be a ledger or a folder with ledgers")
        files += found
    return files


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


def _finite(value: float) -> float | str:
    """Spell infinity as the ledger does; JSON has no number for it."""
    return value if value != float("inf") else "inf"


def _print_json(document: object) -> None:
    typer.echo(json.dumps(document, allow_nan=False))


def main() -> None:
    """Run the command line; bad input is one sentence on stderr and exit status 2."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        app()
    except ValueError as error:
        from model.errors import BadInputError

        if not isinstance(error, BadInputError):
            raise
        sys.stderr.write(f"conclave: {error}\n")
        sys.exit(EXIT_BAD_INPUT)


if __name__ == "__main__":
    main()
