"""Environments that hold every library of this one, and of Conclave no more than they are given."""

from __future__ import annotations

import os
import sysconfig
import venv
from importlib.metadata import distribution
from pathlib import Path

QUIET = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
}
"""The environment variables of a process that imports what is installed, and nothing else."""


def environment(folder: Path, *unpacked: Path) -> Path:
    """Make one in ``folder``, with Flower's commands; return its ``bin``.

    unpacked: wheels to count as installed. A library's own ``.pth`` files are not read, so that an editable install of
    Conclave does not come along.
    """
    venv.create(folder, with_pip=False)
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "given.pth").write_text("".join(f"{path}\n" for path in (*unpacked, sysconfig.get_path("purelib"))))
    programs = folder / "bin"
    for command in distribution("flwr").entry_points:
        program = programs / command.name
        program.write_text(f"#!{programs}/python\nfrom {command.module} import {command.attr} as main\nmain()\n")
        program.chmod(0o755)
    return programs
