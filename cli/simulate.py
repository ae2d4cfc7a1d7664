"""``conclave simulate``: a whole federation on this machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from conclave.base.errors import BadInputError
from conclave.cli.options import Json, Overrides, scenario_of, with_own_code
from conclave.cli.output import print_json, progress, warn_of_budget

if TYPE_CHECKING:
    from conclave.simulations.baselines import BaselineKind


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
        resolved = scenario_of(scenario or "digits", overrides or [], seed)
    else:
        resolved = with_own_code(RunDirectory.open(resume).scenario)

    from conclave.report.report import write_report
    from conclave.report.tables import print_summary
    from conclave.simulations.baseline_run import run_baseline
    from conclave.simulations.simulate import simulate as run_simulation

    if baseline is not None:
        other = _baseline(baseline)
        runs = resolved.nodes if other == "alone" else 1
        with progress(resolved.federation.rounds * runs) as advance:
            summary = run_baseline(
                resolved, other, out, advance, engine=kind, workers=workers, threads=threads, on_run=write_report
            )
        report_path = summary.run / ("node-*/report.html" if other == "alone" else "report.html")
    else:
        run = RunDirectory.create(resolved, out) if resume is None else RunDirectory.open(resume)
        with progress(resolved.federation.rounds) as advance:
            summary = run_simulation(resolved, run, advance, engine=kind, workers=workers, threads=threads)
        report_path = write_report(run)
    print_summary(resolved, summary, report_path)
    warn_of_budget(resolved)
    if as_json:
        result = {name: value for name, value in asdict(summary).items() if value is not None and name != "run"}
        if summary.baseline is not None:
            result["baseline"] = summary.baseline.model_dump(exclude_defaults=True)
        print_json({**result, "run": str(summary.run)})


def _engine(name: str) -> Literal["inline", "ray"]:
    if name == "inline":
        return "inline"
    if name == "ray":
        return "ray"
    raise BadInputError(f"--engine is {name}, must be inline or ray")


def _baseline(name: str) -> BaselineKind:
    from conclave.simulations.baselines import KINDS

    for kind in KINDS:
        if kind == name:
            return kind
    raise BadInputError(f"--baseline is {name}, must be one of {', '.join(KINDS)}")


def _refuse_beside_resume(**given: object) -> None:
    for name, value in given.items():
        if value is not None and value != []:
            option = "the scenario argument" if name == "scenario" else f"--{name}"
            raise BadInputError(f"--resume: cannot be combined with {option}, the run's own scenario continues")
