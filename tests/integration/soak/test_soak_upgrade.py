"""A new release for the whole federation, and the way back to the one before: the ledgers go on under both."""

from __future__ import annotations

import os
import subprocess

import pytest
from federation import CONCLAVE, NODES, Called, Federation
from soaking import asked, balanced, connected, start_again

from conclave.privacy.ledger.reading.history import LedgerFile

pytestmark = pytest.mark.slow

NEW_RELEASE = """import importlib.metadata
real = importlib.metadata.version
importlib.metadata.version = lambda name: "0.2.0" if name == "conclave-moe" else real(name)
"""


@pytest.fixture
def new(federation) -> dict[str, str]:
    """What makes a process one of the new release: its environment."""
    folder = federation.folder / "new-release"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(NEW_RELEASE)
    return {"PYTHONPATH": f"{folder}:{federation.environment.get('PYTHONPATH', '')}"}


def start_all_again(federation: Federation, **environment: str) -> None:
    for name in (*NODES, "server"):
        federation.end(name)
    federation.start("server", "server", "start", "server", **environment)
    for name in NODES:
        start_again(federation, name, **environment)
    federation.wait_for("nodes", lambda: all(connected(federation, name) for name in NODES), 150)
    federation.wait_for_nodes(NODES)


def train(federation: Federation, name: str, **environment: str) -> Called:
    """Run a command as the operator's installation does, in a process of its own."""
    environment = os.environ | federation.environment | environment
    done = subprocess.run(
        [CONCLAVE, *map(str, asked(name, 1))], cwd=federation.folder, env=environment,
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    return Called(done.returncode, done.stdout, done.stderr)


def entries(federation: Federation) -> dict[str, list[bytes]]:
    return {name: list(LedgerFile(federation.folder / name / "state" / "ledger.db").lines()) for name in NODES}


def test_a_new_release_and_the_way_back_keep_every_entry(federation, new):
    assert train(federation, "old").returncode == 0
    written = entries(federation)
    start_all_again(federation, **new)
    assert "0.2.0" in refused_by_the_other(federation, "mixed")
    assert entries(federation) == written
    assert train(federation, "new", **new).returncode == 0
    after = entries(federation)
    assert all(after[name][: len(written[name])] == written[name] for name in NODES)
    start_all_again(federation)
    assert "0.1.0" in refused_by_the_other(federation, "mixed-back", **new)
    assert entries(federation) == after
    assert train(federation, "back").returncode == 0
    for run in ("old-1", "new-1", "back-1"):
        assert balanced(federation, run) == {name: {1: 1} for name in NODES}


def refused_by_the_other(federation: Federation, name: str, **environment: str) -> str:
    """Ask for a run with an operator's installation of the other release; return the one sentence it ends with."""
    refused = train(federation, name, **environment)
    assert refused.returncode == 2
    (sentence,) = refused.stderr.splitlines()
    return sentence
