"""What ``flwr run .`` takes along: Flower leaves files out whose names look like tests', and says nothing."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from flwr.cli.build import build_fab_from_disk

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = [path.name for path in (ROOT / "src" / "conclave").iterdir() if path.is_symlink()]


def test_every_module_and_scenario_travels():
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(ROOT))) as bundle:
        travels = set(bundle.namelist())
    ours = {path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    ours |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "simulations" / "scenarios").glob("*.toml")}
    assert ours - travels == set()
