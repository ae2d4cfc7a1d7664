"""A running server: Flower's SuperLink on loopback, the proxy in front of it, and the runs themselves."""

from __future__ import annotations

import itertools
import logging
import ssl
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid

from conclave.base.errors import BadInputError, UnavailableError
from conclave.deployment.flower.database import bring_up_to_date
from conclave.deployment.flower.grid import run_on_server
from conclave.deployment.flower.runtime import SERVER_APP, RuntimeApi, check_flower, serve
from conclave.deployment.host.alone import alone, check_ports
from conclave.deployment.host.environment import keep_caches_in, private_umask
from conclave.deployment.host.monitoring import HOST, monitoring
from conclave.deployment.host.outward_proxy import check_outward_proxy
from conclave.deployment.host.supervision import Family, Program
from conclave.deployment.operator.flower_control import Control
from conclave.deployment.server.directory import ServerDirectory
from conclave.deployment.server.loopback import LOOPBACK, make_certificate
from conclave.deployment.server.metrics import ServerMetrics
from conclave.deployment.server.proxy import check_proxy, nginx_config, proxy_command
from conclave.server.run import run_scenario
from conclave.server.run_directory import RunDirectory, fresh_directory
from conclave.server.scenario import parse_scenario

log = logging.getLogger("conclave.server")

_DATABASE = "flower.db"
_LONGEST_NAME = 200
_LOOK_S = 0.2
_LOOKS_UNTIL_A_WARNING = 100


def start_server(server: ServerDirectory) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        BadInputError: nginx is missing or refuses its configuration, a proxy of the environment cannot be used, or
            another Flower is installed or its database cannot be used.
        UnavailableError: it is running already.
    """
    check_flower()
    private_umask()
    check_outward_proxy()  # nothing goes there, but every client that Flower makes would fail
    keep_caches_in(server.state)
    config = server.config
    ports = {
        "port": (config.bind, config.port),
        "internal_port": (HOST, config.internal_port),
        "monitoring.metrics_port": (HOST, config.monitoring.metrics_port),
    }
    with alone(server.state):
        check_ports(ports)
        _serve(server)


def _serve(server: ServerDirectory) -> None:
    (server.state / "nginx.conf").write_text(nginx_config(server.config, server.path))
    make_certificate(server.state)
    check_proxy(server.state)
    bring_up_to_date(server.state / _DATABASE)
    with Family([_superlink(server), _proxy(server)]) as family:
        address, ca = f"127.0.0.1:{server.config.internal_port}", server.state / LOOPBACK / "ca.pem"
        metrics = ServerMetrics(server, family.running, lambda: Control(address, ssl.create_default_context(cafile=ca)))
        reached = {"superlink-answers": False}
        with monitoring(server.config.monitoring.metrics_port, metrics, lambda: family.running() | reached):
            _stop_forsaken_runs(metrics.control, family.stopped)
            log.info("listening on %s", server.config.listens_on)
            serve(
                RuntimeApi(address, server.secret.read_bytes(), ca.read_bytes()),
                SERVER_APP,
                lambda api, token: run_on_server(_work(server, metrics), api, token),
                family.stopped,
                lambda found: reached.update({"superlink-answers": found}),
            )


def _stop_forsaken_runs(control: Callable[[], Control], stopped: threading.Event) -> None:
    """Stop what a killed server left behind: Flower would list it as running forever, and nobody works on it."""
    for look in itertools.count(1):
        if stopped.wait(_LOOK_S):
            return
        if look == _LOOKS_UNTIL_A_WARNING:
            log.warning("the SuperLink does not answer yet; state/superlink.log says what it does")
        try:
            with control() as asked:
                for run in asked.runs():
                    if run.status in ("starting", "running"):
                        asked.stop(run.run_id)
                        log.warning("run %d had lost its server; conclave train --resume goes on with it", run.run_id)
            return
        except (BadInputError, UnavailableError):  # the SuperLink is starting
            continue


def _superlink(server: ServerDirectory) -> Program:
    tls = server.state / LOOPBACK
    return Program(
        "superlink",
        [
            str(Path(sys.executable).parent / "flower-superlink"),
            "--ssl-certfile", str(tls / "server.pem"), "--ssl-keyfile", str(tls / "server.key"),
            "--ssl-ca-certfile", str(tls / "ca.pem"), "--host", "127.0.0.1", "--port", str(server.config.internal_port),
            "--enable-supernode-auth", "--database", str(server.state / _DATABASE), "--isolation", "process",
            "--superexec-auth-secret-file", str(server.secret), "--disable-runtime-dependency-installation",
        ],
        server.state / "superlink.log",
        {"FLWR_HOME": str(server.state / "flower")},
    )  # fmt: skip


def _proxy(server: ServerDirectory) -> Program:
    return Program("proxy", proxy_command(server.state), server.state / "proxy.log", {})


def _work(server: ServerDirectory, metrics: ServerMetrics) -> Callable[[Grid, Context, Callable[[str], None]], None]:
    def work(grid: Grid, context: Context, say: Callable[[str], None]) -> None:
        asked = {key: str(value) for key, value in context.run_config.items()}
        run, run_id = _directory(server, asked, str(context.run_id))
        say(f"run directory on the server: {run.path}")
        metrics.running = run
        try:
            run_scenario(grid, run.scenario, run, run_id, on_round=metrics.count_round, say=say)
        finally:
            metrics.running = None
        say(f"finished: {run.path}")

    return work


def _directory(server: ServerDirectory, asked: dict[str, str], flower_run: str) -> tuple[RunDirectory, str]:
    """Return a new run directory, or the one to go on with, and the run's own number, which outlives Flower's."""
    name = asked.get("resume", "")
    if not name:
        scenario = parse_scenario(asked.get("scenario", ""), where="scenario")
        folder = fresh_directory(scenario.name, server.runs / _unused(server, scenario.name))
        run = RunDirectory.create(scenario, folder, mode="deployment")
        (run.path / "run-id").write_text(flower_run)
        return run, flower_run
    if Path(name).name != name or len(name) > _LONGEST_NAME or not (server.runs / name / "run-id").is_file():
        raise BadInputError(f"--resume {name}: no such run on the server, must be the name of a folder in its runs/")
    run = RunDirectory.open(server.runs / name)
    return run, (run.path / "run-id").read_text()


def _unused(server: ServerDirectory, name: str) -> str:
    number = 1
    while (server.runs / f"{name}-{number}").exists():
        number += 1
    return f"{name}-{number}"
