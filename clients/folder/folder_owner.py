"""Whose a folder is: a command run as somebody else would leave files in it that its owner cannot read."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from conclave.base.errors import BadInputError


def check_owner(folder: Path) -> None:
    """Check that this process runs as a folder's owner; root counts as somebody else, too.

    Raises:
        BadInputError: it does not.
        OSError: there is no such folder, or it cannot be looked at.
    """
    owner = folder.stat().st_uid
    if owner != os.geteuid():
        name = _name(owner)
        raise BadInputError(f"{folder}: belongs to user {name}, run this as {name}")


def _name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:  # of another system, or of a container
        return str(user)
