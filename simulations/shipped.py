"""The scenario files that come with Conclave, found by name on nodes and server alike."""

from __future__ import annotations

import difflib
from pathlib import Path

from conclave.base.errors import BadInputError

_FOLDER = Path(__file__).resolve().parent / "scenarios"
DEFAULT = "digits"


def shipped() -> dict[str, Path]:
    """Return name → file of every shipped scenario."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.toml"))}


def find(name: str) -> Path:
    """Return the file of a scenario given by its shipped name or by a path.

    Raises:
        BadInputError: neither exists.
    """
    known = shipped()
    if name in known:
        return known[name]
    if name.endswith(".toml") or "/" in name:
        path = Path(name)
        if path.is_file():
            return path
        found = "is a folder" if path.is_dir() else "no such file"
        raise BadInputError(f"{name}: {found}, must be a scenario in TOML")
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise BadInputError(f"{name}: no such scenario, must be a .toml file or one of {', '.join(known)}{hint}")
