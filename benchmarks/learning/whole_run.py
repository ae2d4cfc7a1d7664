"""One simulation of a scenario, from an empty run directory to its metrics, timed."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from conclave.server.run_directory import RunDirectory
from conclave.server.scenario import Scenario
from conclave.simulations.simulate import Summary, simulate


class WholeRun(NamedTuple):
    """What a run came to: its summary, its metrics round by round, wall seconds."""

    summary: Summary
    metrics: list[dict[str, Any]]
    seconds: float

    @property
    def max_over_mean_load(self) -> float:
        """The busiest expert's share of the first layer's load over the mean, on public test records."""
        load = self.metrics[-1]["load"][0]
        return round(max(load) * len(load), 3)


def whole_run(scenario: Scenario, *, workers: int = 1) -> WholeRun:
    """Simulate a scenario and forget its directory."""
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory.create(scenario, Path(folder) / "run")
        started = time.perf_counter()
        summary = simulate(scenario, directory, workers=workers)
        return WholeRun(summary, directory.metrics(), time.perf_counter() - started)
