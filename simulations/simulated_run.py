"""Where a simulated run lies, for server and simulated nodes alike."""

from __future__ import annotations

import os
from pathlib import Path

RUNS_VARIABLE = "CONCLAVE_RUNS"


def simulated_run_dir(given: str, run_id: int) -> Path:
    """Return the run directory: what the run config names, or one made from the run's id.

    Without a name it is ``flower-<run id>`` in the folder that the environment variable ``CONCLAVE_RUNS`` names, or
    in ``~/conclave-runs``: Flower's processes share neither a working directory nor arguments.
    """
    if given:
        return Path(given)
    base = os.environ.get(RUNS_VARIABLE)
    return (Path(base) if base else Path.home() / "conclave-runs") / f"flower-{run_id}"
