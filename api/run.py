"""Runs from Python: simulate a scenario, and look at what a run left behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from conclave.api.scenario import Scenario
from conclave.base.allowed import check_whole, check_word
from conclave.base.errors import BadInputError
from conclave.server.run_directory import RunDirectory

if TYPE_CHECKING:  # loaded when they are asked for: who reads a run's metrics needs none of them
    from conclave.audit.run import RunAudit
    from conclave.model.network import Network
    from conclave.simulations.simulate import Summary

Engine = Literal["inline", "ray"]
_MOST_AT_ONCE = 256


class Run:
    """One run: the directory that it left, which is all there is to audit, report or resume it.

    Of :func:`conclave.simulate`, or of a directory that is there:

    >>> import conclave
    >>> tiny = {"partition": {"nodes": 2}, "federation": {"rounds": 1}}
    >>> path = conclave.simulate("digits", out="runs/tiny", **tiny).path
    >>> run = conclave.Run.open(path)
    >>> run.scenario.name, len(run.metrics), len(run.ledgers)
    ('digits', 1, 2)
    >>> run.audit().verdict
    'NOT_REFUTED'
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open a run directory.

        Raises:
            BadInputError: it is none.
        """
        return cls(RunDirectory.open(Path(path)))

    def __repr__(self) -> str:
        return f"Run.open({str(self.path)!r})"

    @property
    def path(self) -> Path:
        """The run directory."""
        return self._directory.path

    @property
    def scenario(self) -> Scenario:
        """What was run, with every default written out."""
        return Scenario.read(self.path / "scenario.toml")

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One mapping a round, the first round first.

        Raises:
            BadInputError: no round is finished, or the file is damaged.
        """
        return self._directory.metrics()

    @property
    def ledgers(self) -> list[Path]:
        """The nodes' ledgers. Of a simulation: in a deployment each stays with its owner, and the list is empty."""
        return self._directory.ledgers

    @property
    def summary(self) -> Summary:
        """What a simulation came to: accuracy or bits per byte, the largest ε of its ledgers, traffic.

        Raises:
            BadInputError: no round is finished, a file is damaged, or the ledgers are not here: it was no simulation.
        """
        from conclave.simulations.simulate import summarize

        if self._directory.mode == "deployment":
            raise BadInputError(f"{self.path}: a run of real nodes, which keep their ledgers; must be a simulation")
        return summarize(self._directory)

    def model(self) -> Network:
        """Load the final model, in evaluation mode.

        Raises:
            BadInputError: the run is not finished, or its model is the user's own or damaged.
        """
        from conclave.model.store import load

        return load(self.path)

    def report(self) -> Path:
        """Write ``report.html``, which needs nothing else to be opened, and return its path.

        Raises:
            BadInputError: no round is finished, or a file is damaged.
        """
        from conclave.report.report import write_report

        return write_report(self._directory)

    def audit(self) -> RunAudit:
        """Compare receipts, ledgers and plan. The verdict of a run that holds is ``NOT_REFUTED``, never "proved".

        Raises:
            BadInputError: a file is damaged.
        """
        from conclave.audit.run import audit_run

        return audit_run(self._directory)

    def resume(
        self,
        *,
        engine: Engine = "inline",
        workers: int = 1,
        threads: int = 1,
        on_round: Callable[[int], None] = lambda _: None,
    ) -> Self:
        """Do the rounds of a simulation that are left, as if nothing had happened. Arguments as of :func:`simulate`."""
        _check(engine, workers, threads)
        from conclave.simulations.simulate import simulate as simulate_rounds

        simulate_rounds(self.scenario, self._directory, on_round, engine=engine, workers=workers, threads=threads)
        return self


def simulate(
    scenario: str | os.PathLike[str] | Scenario = "digits",
    *,
    out: str | os.PathLike[str] | None = None,
    engine: Engine = "inline",
    workers: int = 1,
    threads: int = 1,
    on_round: Callable[[int], None] = lambda _: None,
    **overrides: Any,
) -> Run:
    """Run a whole federation on this machine.

    >>> import conclave
    >>> run = conclave.simulate("digits", seed=3, partition={"nodes": 2}, federation={"rounds": 1}, out="runs/short")
    >>> run.summary.rounds, run.summary.epsilon <= 8.0
    (1, True)
    >>> sorted(path.name for path in run.path.iterdir())
    ['checkpoint', 'environment.json', 'ledgers', 'metrics.jsonl', 'model', 'receipts.jsonl', 'scenario.toml']

    Sampling and noise follow from the scenario's seed, so that a run can be repeated: its ledgers say so, and that
    protects nobody.

    Args:
        scenario: one that comes with Conclave, a TOML file, or what was made of either.
        out: the run directory, new or empty; ``runs/<scenario>-<UTC time>`` if not given.
        engine: ``inline`` calls the nodes directly; ``ray`` is Flower's own simulation runtime.
        workers: nodes run in this process (1), or in so many processes with one thread each. The result is the same.
        threads: torch's threads in this process.
        on_round: called with a round's number whenever one of its replies has arrived.
        overrides: as of :meth:`Scenario.read <conclave.api.scenario.Scenario.read>`.

    Raises:
        BadInputError: the scenario cannot be carried out, or the directory is in use.
        RunFailedError: nodes refused, or no round changed anything.
    """
    _check(engine, workers, threads)  # before there is a directory
    chosen = scenario.replace(**overrides) if isinstance(scenario, Scenario) else Scenario.read(scenario, **overrides)
    run = Run(RunDirectory.create(chosen, None if out is None else Path(out)))
    return run.resume(engine=engine, workers=workers, threads=threads, on_round=on_round)


def _check(engine: Engine, workers: int, threads: int) -> None:
    check_word("engine", engine, get_args(Engine))
    check_whole("workers", workers, 1, _MOST_AT_ONCE)
    check_whole("threads", threads, 1, _MOST_AT_ONCE)
