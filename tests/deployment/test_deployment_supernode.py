"""Flower's SuperNode as a node starts it: it does not outlive its connection, and keeps pace."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectUnavailableError, pull_objects
from flwr.supercore.run import RunNotRunningException
from flwr.supernode import start_client_internal

from conclave.deployment.flower import runtime as flower_runtime
from conclave.deployment.flower import supernode

SOURCES = Path(__file__).resolve().parents[2] / "src"


def test_flowers_loop_sleeps_by_the_module_that_is_replaced():
    """The two sleeps that ``Pace`` tells apart, as they stand in Flower's source."""
    assert start_client_internal.time is time
    sleeps = [
        line.strip() for line in Path(start_client_internal.__file__).read_text().splitlines() if "sleep(" in line
    ]
    assert sorted(sleeps) == ["time.sleep(0.5)", "time.sleep(0.5)", "time.sleep(3)"]


def test_it_looks_often_while_there_are_messages_and_seldom_otherwise(monkeypatch):
    now, slept = [100.0], []
    monkeypatch.setattr("conclave.deployment.flower.supernode.time.monotonic", lambda: now[0])
    monkeypatch.setattr("conclave.deployment.flower.supernode.time.sleep", slept.append)
    pace = supernode.Pace()
    pace.sleep(3)
    pace.sleep(0.5)  # an answer is waited for
    pace.sleep(3)
    now[0] += 59.0
    pace.sleep(3)
    now[0] += 2.0
    pace.sleep(3)
    assert slept == [3, 0.05, 0.3, 0.3, 3]
    assert pace.time is time.time


def test_flower_still_has_the_command():
    assert len(entry_points(group="console_scripts", name="flower-supernode")) == 1


def test_it_ends_where_flower_gives_up_but_leaves_a_thread_that_keeps_the_process():
    code = """
import sys, threading
from types import SimpleNamespace
from conclave.deployment.flower import runtime, supernode

def gives_up():
    print(sys.argv)
    threading.Thread(target=threading.Event().wait).start()

supernode.entry_points = lambda group, name: [SimpleNamespace(load=lambda: gives_up)]
supernode.main()
"""
    done = subprocess.run(
        [sys.executable, "-u", "-c", code, "--port", "1"], env=os.environ | {"PYTHONPATH": str(SOURCES)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == "['flower-supernode', '--port', '1']\n"
    assert done.stderr == "the connection to the server is lost\n"


def test_it_brings_no_torch_along():
    """It runs beside the node's own process, which has all that."""
    code = "import sys, conclave.deployment.flower.supernode; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(SOURCES)}, capture_output=True, text=True,
        timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout == "False\n"


def test_the_rest_of_a_message_is_not_waited_for_without_end(monkeypatch):
    """Where it never comes; Flower's own bound is 7,200 s, checked where a part is not there yet."""
    assert start_client_internal.pull_objects is pull_objects  # what main() replaces, by a name that the loop reads
    assert flower_runtime.PATIENCE_S == supernode.PATIENCE_S

    def never(object_id):
        raise ObjectUnavailableError(object_id)

    monkeypatch.setattr(supernode, "PATIENCE_S", 0.0)
    with pytest.raises(ObjectPullError):
        supernode.pull_whole(["a"], never)


def test_a_message_of_a_run_that_was_stopped_is_an_error_that_flower_cleans_up_after():
    """It catches Exception there, and its own RunNotRunningException is none."""
    assert not issubclass(RunNotRunningException, Exception)

    def over(object_id):
        raise RunNotRunningException

    with pytest.raises(ObjectPullError, match="its run is over"):
        supernode.pull_whole(["a"], over)
    assert supernode.pull_whole(["a", "b"], str.encode) == {"a": b"a", "b": b"b"}


def test_the_process_uses_the_bound_and_the_pace():
    code = """
from flwr.supernode import start_client_internal as loop
from types import SimpleNamespace
from conclave.deployment.flower import supernode

supernode.entry_points = lambda group, name: [SimpleNamespace(load=lambda: lambda: print(
    loop.pull_objects is supernode.pull_whole, type(loop.time).__name__))]
supernode.main()
"""
    done = subprocess.run(
        [sys.executable, "-u", "-c", code], env=os.environ | {"PYTHONPATH": str(SOURCES)}, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout == "True Pace\n", done.stderr
