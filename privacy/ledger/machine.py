"""Which machine this is: a ledger is bound to one, so that a copied one cannot be spent twice."""

from __future__ import annotations

from pathlib import Path

from conclave.base.canonical import sha256
from conclave.base.errors import BadInputError

_FILES = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))


def machine_id(stated: str | None = None) -> str:
    """Return a hash of the operating system's machine id, or of ``stated``, which the owner chose instead.

    Containers of one image may share an id, or have none: state one.

    Raises:
        BadInputError: the system has no id and none was stated.
    """
    if stated is not None:
        return _hashed(stated)
    for path in _FILES:
        try:
            found = path.read_text().strip()
        except OSError:
            continue
        if found:
            return _hashed(found)
    raise BadInputError("this system has no /etc/machine-id, so node.toml must state one as storage.machine")


def _hashed(name: str) -> str:
    # Systems ask that their id be shown to nobody as it is.
    return sha256(f"conclave machine {name}".encode())[:32]
