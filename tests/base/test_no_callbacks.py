"""Importing any package that brings in Flower or the dataset libraries silences them first."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SWITCHES = ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


@pytest.mark.parametrize(
    "module", ["conclave", "conclave.data.config", "conclave.clients.operations_config", "conclave.__main__"]
)
def test_call_outs_are_off_before_a_library_is_imported(module):
    code = f"import os, sys, {module}\nassert not {{'flwr', 'datasets'}} & set(sys.modules)\n"
    code += f"print(*(os.environ.get(name) for name in {SWITCHES}))"
    hostile = os.environ | {
        "FLWR_TELEMETRY_ENABLED": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "0",
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
    }
    done = subprocess.run([sys.executable, "-c", code], env=hostile, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "1", "1", "1"]
