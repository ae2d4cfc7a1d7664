"""A server behind its proxy and nodes in one folder, as real processes on loopback; and the data they train on.

The data are heart disease by hospital where ``CONCLAVE_DATA`` is set, else a table that comes with scikit-learn, in
three formats. Needs nginx.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_breast_cancer

import conclave.cli.main
from conclave.base.errors import BadInputError
from conclave.deployment.server.proxy import nginx_program

try:
    nginx_program()
except BadInputError as missing:
    pytest.skip(str(missing), allow_module_level=True)

CONCLAVE = str(Path(sys.executable).with_name("conclave"))
NODES = ("first", "second", "third")
FORMATS = {"first": "csv", "second": "parquet", "third": "npz"}
HOSPITALS = dict(zip(NODES, ("cleveland", "hungarian", "va"), strict=True))
SCENARIO = """name = "patients"
[model]
preset = "moe"
width = 16
norm = "rms"
encoder = {{ kind = "table", features = {features} }}
head = {{ kind = "classification", classes = 2 }}
[model.experts]
routed = 4
hidden = 16
top_k = 1
[data]
source = "nodes"
[partition]
scheme = "iid"
nodes = 3
[privacy]
epsilon = 8.0
delta = 1e-4
clip = 1.0
sampling_rate = 0.5
[training]
steps = 2
learning_rate = 0.5
[federation]
rounds = 3
experts_per_node = 2
reply_timeout_s = 120.0
[evaluation]
every = 3
held_out = 0.2
"""


FAR = "fed.test"
"""A name of the server that this machine cannot resolve."""


def free_port() -> int:
    """Return a port below those that connections going out are given: until it is used, nobody else comes by it."""
    while True:
        port = secrets.randbelow(12_000) + 20_000
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Called(NamedTuple):
    """How a command ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


class Command:
    """A command that goes on meanwhile, in a forked copy of this process: the libraries are loaded there already."""

    def __init__(self, work: Callable[[], None], said: Path) -> None:
        self._said = said
        self._process = multiprocessing.get_context("fork").Process(target=self._run, args=(work,))
        self._process.start()

    def _run(self, work: Callable[[], None]) -> None:
        os.setsid()
        with self._said.open("w", buffering=1) as out:
            sys.stdout = sys.stderr = out
            work()

    @property
    def said(self) -> str:
        """What it printed so far, to either stream."""
        return self._said.read_text() if self._said.exists() else ""

    def end(self, seconds: float = 120.0) -> int:
        """Wait until it ends; return its exit status."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            raise AssertionError(f"the command did not end; it said\n{self.said}")
        return self._process.exitcode


class Federation:
    """A server and nodes in a folder, and the processes that run them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.environment = os.environ | {"XDG_STATE_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
        self.environment.pop("TORCHINDUCTOR_CACHE_DIR", None)  # this process's own, if it has compiled anything
        self.watched = {name: folder / f"watched-{name.lower()}" for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME")}
        for path in self.watched.values():
            path.mkdir()
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.begun = 0

    def serve(self) -> None:
        """Make the server and a scenario, and start it."""
        (self.folder / "patients.toml").write_text(SCENARIO.format(features=13))
        self.must("server", "init", "server", "--host", "localhost", "--host", FAR, "--port", self.port)
        config = self.folder / "server" / "server.toml"
        text = config.read_text().replace("internal_port = 9091", f"internal_port = {free_port()}")
        config.write_text(text.replace("# metrics_port = 9464", f"metrics_port = {free_port()}"))
        self.start("server", "server", "start", "server")

    def create_node(
        self, name: str, *, like: str | None = None, epsilon: float = 8.0, port: int | None = None, columns: int = 13,
        host: str = "localhost",
    ) -> None:  # fmt: skip
        """Make a node with data of its own.

        like: one of :data:`NODES`, whose share of the data it gets; itself if not given. port: that it dials, the
        server's if not given. columns: so many of the 13 are there. host: the server's name.
        """
        share = like or name
        described = write_data(self.folder / "data" / name, share, columns)
        data = f"data/{name}/rows.npz" if FORMATS[share] == "npz" else f"data/{name}"
        self.must(
            "node", "init", name, "--dataset", name, "--data", data, "--declared-size", 190, "--epsilon", epsilon,
            "--delta", 1e-4, "--witness", f"witness/{name}", "--held-out", 0.2, "--machine", "loopback",
            "--superlink", f"{host}:{port or self.port}", "--ca", "server/operator/ca.pem",
        )  # fmt: skip
        self.edit_node(name, "internal_port = 9094", f"internal_port = {free_port()}")
        self.edit_node(name, "# metrics = 1.0", "metrics = 1.0")
        with (self.folder / name / "node.toml").open("a") as config:
            config.write(f"\n{described}")

    def edit_node(self, name: str, old: str, new: str) -> None:
        """Replace a part of a node's configuration; it is read when the node starts."""
        path = self.folder / name / "node.toml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def connect(self, name: str, **environment: str) -> None:
        """Enrol a node, once the server answers, and start it."""
        self.wait_for("a server", lambda: self.call("status", "--superlink", "server/operator").returncode == 0)
        self.must("server", "enrol", f"{name}/state/node.key.pub", "--superlink", "server/operator")
        self.start(name, "node", "start", name, **environment)

    def wait_for_nodes(self, names: Sequence[str]) -> None:
        """Wait until so many nodes are enrolled, and all are connected."""
        self.wait_for(f"{len(names)} nodes", lambda: list(self.status()["nodes"].values()) == ["online"] * len(names))

    def call(self, *arguments: object) -> Called:
        """Run a command to its end, in this process: importing torch anew each time would take most of the time."""
        out, err = io.StringIO(), io.StringIO()
        with (
            mock.patch.object(sys, "argv", ["conclave", *map(str, arguments)]),
            mock.patch.dict(os.environ, self.environment),
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                conclave.cli.main.main()
                code = 0
            except SystemExit as ended:
                code = int(ended.code or 0)
        return Called(code, out.getvalue(), err.getvalue())

    def must(self, *arguments: object) -> str:
        done = self.call(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def begin(self, *arguments: object) -> Command:
        """Run a command beside this process."""

        def work() -> None:
            sys.argv = ["conclave", *map(str, arguments)]
            os.environ.update(self.environment)
            os.chdir(self.folder)
            conclave.cli.main.main()

        self.begun += 1
        return Command(work, self.folder / f"command-{self.begun}.log")

    def start(self, name: str, *arguments: object, **environment: str) -> None:
        """Start a process that goes on, with variables of its own in its environment."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [CONCLAVE, *map(str, arguments)], cwd=self.folder, stdout=log, stderr=log, start_new_session=True,
                env=self.environment | {name: str(path) for name, path in self.watched.items()} | environment,
            )  # fmt: skip

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def end(self, name: str, by: int = signal.SIGTERM) -> int:
        process = self.running.pop(name)
        process.send_signal(by)
        return process.wait(30)

    def end_all(self) -> None:
        """End all processes at once. Whichever does not end as asked is killed, and is a failure."""
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        late = []
        for name, process in self.running.items():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                late.append(name)
                process.kill()
                process.wait()
        self.running.clear()
        assert not late, f"{late} did not end within 30 s"

    def status(self) -> dict[str, object]:
        return json.loads(self.must("status", "--superlink", "server/operator", "--json").splitlines()[-1])

    def wait_for(self, what: str, condition, seconds: float = 90.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            logs = "\n".join(f"{name}: {self.log(name)[-2000:]}" for name in self.running)
            assert time.monotonic() < deadline, f"{what} did not come about\n{logs}"
            for name, process in self.running.items():
                assert process.poll() is None, f"{name} ended: {self.log(name)[-2000:]}"
            time.sleep(0.2)


def rows_of(name: str) -> tuple[np.ndarray, np.ndarray]:
    """A node's share of the fallback table: standardised by constants, not by the data."""
    table = load_breast_cancer()
    part = slice(NODES.index(name), None, 3)
    return table.data[part, :13], table.target[part]


def write_data(folder: Path, name: str, columns_left: int = 13) -> str:
    """Write a node's data in its format; return the ``[format]`` that describes them."""
    folder.mkdir(parents=True)
    given = os.environ.get("CONCLAVE_DATA")
    columns = [f"c{number}" for number in range(columns_left)]
    if given is None:
        values, label = rows_of(name)
    else:
        text = (Path(given) / "heart-disease" / f"processed.{HOSPITALS[name]}.data").read_text().replace("?", "nan")
        table = np.array([line.split(",") for line in text.split()], dtype=np.float64)
        values, label = table[:, :13], (table[:, 13] > 0).astype(np.int64)
    values = values[:, :columns_left].astype(np.float32)
    if FORMATS[name] == "csv":
        lines = [
            ",".join([*(("" if v != v else f"{v:g}") for v in row), str(y)])
            for row, y in zip(values, label, strict=True)
        ]
        (folder / "rows.csv").write_text("\n".join([",".join([*columns, "label"]), *lines, "not,a,row"]) + "\n")
    elif FORMATS[name] == "parquet":
        pq.write_table(
            pa.table({c: values[:, i] for i, c in enumerate(columns)} | {"label": label}), folder / "rows.parquet"
        )
    else:
        np.savez(folder / "rows.npz", values=values, label=label)
    source = 'table = "values"\n' if FORMATS[name] == "npz" else ""
    return f'[format]\nkind = "{FORMATS[name]}"\n{source}label = "label"\nclasses = 2\nmissing = 0.0\nscale = 100.0\n'
