"""A copy of a ledger that may be kept elsewhere: consistent, also while the node works, and without its secrets."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from conclave.base.errors import BadInputError


def copy_without_secrets(path: Path) -> bytes:
    """Return a ledger's file as bytes, as of one moment.

    The seeds of charges whose work is not done are left out. The ledger erases them once the output exists, for with
    the seed the noise can be taken off it; a copy would keep them. Where such a copy is restored, these charges are
    abandoned.

    Raises:
        BadInputError: it is no ledger, or cannot be read.
    """
    try:
        with (
            contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as ledger,
            contextlib.closing(sqlite3.connect(":memory:")) as copy,
        ):
            ledger.backup(copy)
            copy.execute("PRAGMA secure_delete = ON")  # as in the ledger: what is deleted is overwritten
            copy.execute("DELETE FROM secrets")
            copy.commit()
            return copy.serialize()
    except sqlite3.Error as error:
        raise BadInputError(f"{path}: cannot be copied, must be a ledger") from error
