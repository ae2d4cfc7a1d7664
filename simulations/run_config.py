"""What a run config says: the scenario, and where the run lies. Server and simulated nodes read it alike."""

from __future__ import annotations

import os
from pathlib import Path

from conclave.base.errors import BadInputError
from conclave.simulations.shipped import DEFAULT, shipped

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


def scenario_text(value: str) -> str:
    """Return the TOML of a run-config value: TOML itself, a shipped name, or nothing for the default scenario.

    A path is not accepted: a run config may come from elsewhere, and must not name files.

    Raises:
        BadInputError: neither.
    """
    if "=" in value:
        return value
    known = shipped()
    name = value.strip() or DEFAULT
    if name not in known:
        raise BadInputError(f"scenario is {name!r}, must be TOML or one of {', '.join(known)}")
    return known[name].read_text(encoding="utf-8")
