"""What a long-running process sets for itself and its children before anything else."""

from __future__ import annotations

import os
from pathlib import Path

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def private_umask() -> None:
    """Only the owner can read whatever is created from now on."""
    os.umask(0o077)


def keep_caches_in(folder: Path) -> None:
    """Have torch, which makes a folder for compiled code even if nothing is compiled, make it here."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "torch")


def reach_loopback_directly() -> None:
    """Send nothing that is meant for this machine to a proxy that the environment names.

    ``HTTPS_PROXY`` and its relatives are for the way to the server. A node's own processes talk on loopback, with a
    secret that no proxy may see.
    """
    stated = os.environ.get("no_proxy", os.environ.get("NO_PROXY", ""))  # as they are read: the small one first
    known = [host for host in stated.split(",") if host]
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join([*known, *(host for host in _LOOPBACK if host not in known)])
