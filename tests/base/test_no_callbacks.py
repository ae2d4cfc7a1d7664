"""However Conclave is entered, the switches of libraries that would call out are set before any is imported."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
SPY = f"""
import os, runpy, sys

class Spy:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in (*sys.stdlib_module_names, "conclave"):
            print(name, *(os.environ.get(switch) for switch in {list(SWITCHES)}), flush=True)
            os._exit(0)  # what comes after is of no interest

sys.meta_path.insert(0, Spy())
"""
ENTRIES = {
    "the command": "import conclave.cli.main",
    "the module": "runpy.run_module('conclave', run_name='__main__')",
    "python": "import conclave; conclave.simulate",
    "flower's client app": "import conclave.simulations.client_app",
    "flower's server app": "import conclave.simulations.server_app",
    "a worker": "runpy.run_module('conclave.simulations.engines.worker', run_name='__main__')",
    "a node's supernode": "runpy.run_module('conclave.deployment.flower.supernode', run_name='__main__')",
    "a node": "import conclave.deployment.node.process",
    "a server": "import conclave.deployment.server.process",
    "data": "import conclave.data.partition",
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_call_outs_are_off_before_a_library_is_imported(entry):
    hostile = os.environ | {name: "0" if value == "1" else "1" for name, value in SWITCHES.items()}
    command = [sys.executable, "-c", SPY + ENTRIES[entry]]
    done = subprocess.run(command, env=hostile, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    library, *found = done.stdout.split()
    assert dict(zip(SWITCHES, found, strict=True)) == SWITCHES, library


def test_nothing_else_sets_the_switches():
    setting = set()
    for folder in (path.resolve() for path in (ROOT / "src" / "conclave").iterdir() if path.is_symlink()):
        for path in folder.rglob("*.py"):
            texts = (node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
            if any(isinstance(text, str) and name in text for text in texts for name in SWITCHES):
                setting.add(path.relative_to(ROOT).as_posix())
    assert setting == {"base/silence.py"}
