"""Data sets that are not part of Conclave, and where the user keeps them."""

from __future__ import annotations

import os
from pathlib import Path

from conclave.base.errors import BadInputError

DATA_VARIABLE = "CONCLAVE_DATA"


def find_data(source: str, name: str) -> Path:
    """Return a file, plain or ``.gz``, from the folder that ``CONCLAVE_DATA`` names or from its subfolder ``source``.

    Raises:
        BadInputError: the variable is not set, or there is no such file.
    """
    base = os.environ.get(DATA_VARIABLE)
    if not base:
        raise BadInputError(
            f"data.source is {source}, but the environment variable {DATA_VARIABLE} is not set: "
            f"must name the folder that holds {name} or {source}/{name}"
        )
    for folder in (Path(base) / source, Path(base)):
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():  # neither a folder nor a pipe that never ends
                return path
    raise BadInputError(f"{DATA_VARIABLE} is {base}: no {name} there, must hold it or {source}/{name}, plain or .gz")
