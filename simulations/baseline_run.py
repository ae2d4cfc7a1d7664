"""Run a baseline and sum it up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Literal

from conclave.base.errors import BadInputError
from conclave.server.run_directory import RunDirectory, fresh_directory
from conclave.server.scenario import Scenario
from conclave.simulations.baseline_note import BaselineNote
from conclave.simulations.baselines import BaselineKind, baseline, size_match
from conclave.simulations.simulate import Summary, simulate


def run_baseline(
    scenario: Scenario,
    kind: BaselineKind,
    out: Path | None = None,
    on_round: Callable[[int], None] = lambda _: None,
    *,
    engine: Literal["inline", "ray"] = "inline",
    workers: int = 1,
    threads: int = 1,
    on_run: Callable[[RunDirectory], object] = lambda _: None,
) -> Summary:
    """Run a baseline of a scenario.

    Args:
        on_run: called with every run directory, once its run is over.

    Other arguments: as of :func:`conclave.simulations.simulate.simulate`.

    The run directory is that of any run, with a note. For ``alone`` it holds one for each node, ``node-0000`` and so
    on; quality is then the mean over nodes, ε the largest, and ``on_round`` counts the rounds of all nodes.

    Raises:
        BadInputError: the model has no such baseline, or the scenario cannot be carried out.
    """
    if kind == "alone" and engine == "ray":
        raise BadInputError(
            "--baseline alone: cannot be combined with --engine ray, its nodes train one after the other"
        )
    made = baseline(scenario, kind)
    note = BaselineNote(kind=kind, of=scenario.name)
    if kind == "alone":
        return _alone(made, note, fresh_directory(made[0].name, out), on_round, workers, threads, on_run)
    if kind != "central":
        wanted, got = size_match(scenario.model, made[0].model, kind)
        note = note.model_copy(update={"parameters": got, "parameters_wanted": wanted})
    run = RunDirectory.create(made[0], out)
    note.write(run.path)
    summary = simulate(made[0], run, on_round, engine=engine, workers=workers, threads=threads)
    on_run(run)
    return summary


def _alone(
    made: Sequence[Scenario],
    note: BaselineNote,
    folder: Path,
    on_round: Callable[[int], None],
    workers: int,
    threads: int,
    on_run: Callable[[RunDirectory], object],
) -> Summary:
    note.write(folder)
    summaries = []
    for place, scenario in enumerate(made):
        run = RunDirectory.create(scenario, folder / f"node-{scenario.partition.only:04d}")
        note.write(run.path)
        before = place * scenario.federation.rounds
        summaries.append(simulate(scenario, run, partial(_later, on_round, before), workers=workers, threads=threads))
        on_run(run)
    accuracy, bits = ([getattr(s, name) for s in summaries] for name in ("accuracy", "bits_per_byte"))
    done = note.model_copy(update={"quality_of_nodes": tuple(bits if None in accuracy else accuracy)})
    done.write(folder)
    return replace(
        summaries[0],
        accuracy=None if None in accuracy else fmean(accuracy),
        bits_per_byte=None if None in bits else fmean(bits),
        epsilon=max(summary.epsilon for summary in summaries),
        run=folder,
        baseline=done,
    )


def _later(on_round: Callable[[int], None], before: int, round_number: int) -> None:
    on_round(before + round_number)
