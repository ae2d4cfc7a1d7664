"""Flower's own simulation runtime does what the inline engine does. Slow: Ray starts processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from environments import QUIET, environment
from run_samples import events

from conclave.server.run_directory import RunDirectory
from conclave.server.scenario import read_scenario
from conclave.simulations.shipped import find
from conclave.simulations.simulate import simulate

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
CHANGES = {"federation.rounds": 3, "partition.nodes": 4}
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("more", [{}, {"traffic.delta": "int8", "traffic.model": "bf16"}, {"evaluation": {"every": 2}}])
def test_ray_gives_the_same_ledger_events_and_model(tmp_path, more):
    scenario = read_scenario(find("digits"), CHANGES | more)
    runs = {}
    for engine in ("inline", "ray"):
        runs[engine] = RunDirectory.create(scenario, tmp_path / engine)
        simulate(scenario, runs[engine], engine=engine, workers=2)
    assert events(runs["inline"]) == events(runs["ray"])  # output hashes included: the floats are the same too
    model = "model/model.safetensors"
    assert (runs["inline"].path / model).read_bytes() == (runs["ray"].path / model).read_bytes()


@pytest.mark.parametrize("installed", [True, False], ids=["installed", "by-itself"])
def test_flwr_run_runs_a_scenario(tmp_path, installed):
    """``flwr run .`` as documented, against a SuperLink that installs nothing.

    By itself: where the libraries are, as Flower installs them for a bundle, and Conclave is nowhere else.
    """
    programs = Path(sys.executable).parent if installed else environment(tmp_path / "environment")
    port = "18713"
    variables = QUIET | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(tmp_path / "flower"),
        "CONCLAVE_RUNS": str(tmp_path / "runs"),
    }
    (tmp_path / "flower").mkdir()
    (tmp_path / "flower" / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    superlink = subprocess.Popen(
        ["flower-superlink", "--insecure", "--simulation", "--disable-runtime-dependency-installation", "--port", port],
        env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        toml = read_scenario(find("digits"), CHANGES).to_toml()
        config = tmp_path / "run-config.toml"
        config.write_text(f"scenario = '''\n{toml}'''\n")
        command = ["flwr", "run", ".", "here", "--run-config", str(config)]
        command += ["--federation-config", "num-supernodes=4", "--stream"]
        deadline = time.monotonic() + 60
        while True:  # until the SuperLink listens
            done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
            if "unavailable" not in done.stdout + done.stderr or time.monotonic() > deadline:
                break
        (run,) = (tmp_path / "runs").glob("flower-*")
        assert [line["accepted"] for line in RunDirectory(run).metrics()] == [4, 4, 4], done.stdout + done.stderr
        assert len(RunDirectory(run).ledgers) == 4
    finally:
        os.killpg(superlink.pid, signal.SIGKILL)
        superlink.wait()
