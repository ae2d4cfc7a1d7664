"""The files of a data set, in an order that depends on their names alone, opened for reading only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from conclave.base.errors import BadInputError


def files_in(path: Path, suffixes: Sequence[str]) -> list[Path]:
    """Return a file itself, or all files of a folder and its sub-folders that end like that, in any case.

    Hidden files, and files in hidden folders, are left out: they belong to other programs.

    Raises:
        BadInputError: there is none.
    """
    if path.is_file():  # neither a folder nor a pipe that never ends
        return [path]
    found = [file for file in path.rglob("*") if file.name.lower().endswith(tuple(suffixes)) and file.is_file()]
    found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not found:
        raise BadInputError(f"{path}: must be a file or a folder with files that end in {' or '.join(suffixes)}")
    return sorted(found, key=lambda file: file.relative_to(path).parts)


def folder_at(path: Path) -> Path:
    """Return the path of a folder.

    Raises:
        BadInputError: it is none.
    """
    if not path.is_dir():
        raise BadInputError(f"{path}: must be a folder")
    return path
