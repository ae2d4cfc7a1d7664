"""The ray engine: Flower's own simulation runtime, which spreads nodes over cores, GPUs and machines.

Flower's ``run_simulation`` is deprecated in favour of ``flwr run`` and takes neither a run id nor a run config. What it
calls underneath takes both; that is private, and every use of it is in this file.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
import warnings
from pathlib import Path

import tomli_w
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import ServerApp
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from conclave.base.errors import BadInputError

_COMPONENTS = {
    "clientapp": "conclave.simulations.client_app:app",
    "serverapp": "conclave.simulations.server_app:app",
}


def run_on_ray(
    server_app: ServerApp, client_app: ClientApp, *, nodes: int, run_id: int, run_config: dict[str, str], workers: int
) -> None:
    """Run a whole federation on Flower's Ray backend, ``workers`` nodes at a time with one CPU each.

    Raises:
        BadInputError: Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise BadInputError("--engine ray: Ray is not installed, must be: pip install 'conclave-moe[ray]'")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    from flwr.simulation.run_simulation import _run_simulation
    from flwr.supercore.telemetry import EventType

    run = Run.create_empty(run_id)
    run.primary_task_id, run.federation_id, run.override_config = 1, NOOP_FEDERATION_ID, dict(run_config)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, SUPERLINK_NODE_ID, 1
    context = Context(
        run_id=run_id, node_id=SUPERLINK_NODE_ID, node_config={}, state=RecordDict(), run_config=dict(run_config)
    )
    flower_log = logging.getLogger("flwr")
    level, flower_log.level = flower_log.level, logging.WARNING
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray and Flower about their own futures
        (Path(folder) / "pyproject.toml").write_text(_project(run_config))
        try:
            _run_simulation(
                num_supernodes=nodes,
                exit_event=EventType.PYTHON_API_RUN_SIMULATION_LEAVE,
                client_app=client_app,
                server_app=server_app,
                server_app_context=context,
                app_dir=folder,
                is_app=True,
                run=run,
                backend_config={
                    "client_resources": {"num_cpus": 1.0, "num_gpus": 0.0},
                    "init_args": {"num_cpus": workers, "logging_level": logging.ERROR, "log_to_driver": False},
                },
            )
        finally:
            flower_log.level = level
            _shut_down()


def _project(run_config: dict[str, str]) -> str:
    """Return the project file by which nodes get their run config; the values are in the run's overrides."""
    app = {"publisher": "conclave", "components": _COMPONENTS, "config": dict.fromkeys(run_config, "")}
    return tomli_w.dumps({"project": {"name": "conclave-moe", "version": "0.0.0"}, "tool": {"flwr": {"app": app}}})


def _shut_down() -> None:
    import ray

    ray.shutdown()
