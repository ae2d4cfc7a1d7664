"""Flower's SuperNode as a node starts it: it does not outlive its connection."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_flower_still_has_the_command():
    assert len(entry_points(group="console_scripts", name="flower-supernode")) == 1


def test_it_ends_where_flower_gives_up_but_leaves_a_thread_that_keeps_the_process():
    code = """
import sys, threading
from types import SimpleNamespace
from deployment import supernode

def gives_up():
    print(sys.argv)
    threading.Thread(target=threading.Event().wait).start()

supernode.entry_points = lambda group, name: [SimpleNamespace(load=lambda: gives_up)]
supernode.main()
"""
    done = subprocess.run(
        [sys.executable, "-u", "-c", code, "--port", "1"], env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == "['flower-supernode', '--port', '1']\n"
    assert done.stderr == "the connection to the server is lost\n"


def test_it_brings_no_torch_along():
    """It runs beside the node's own process, which has all that."""
    code = "import sys, deployment.supernode; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout == "False\n"
