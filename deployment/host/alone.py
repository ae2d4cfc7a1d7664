"""One process per folder, and free ports: a second start would fight with the first."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from conclave.base.errors import BadInputError, UnavailableError

PATIENCE_S = 15.0
_LOOK_S = 0.1


@contextmanager
def alone(state: Path) -> Iterator[None]:
    """Hold a folder for this process within.

    Args:
        state: where a lock is kept.

    Raises:
        UnavailableError: another process holds it.
    """
    lock = os.open(state / "running.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UnavailableError(f"{state.parent}: is running already, must be stopped first") from error
        yield
    finally:
        os.close(lock)


def check_ports(ports: Mapping[str, tuple[str, int | None]]) -> None:
    """Check that ports can be listened on.

    Args:
        ports: configuration key → address and port; None if it does not listen.

    Raises:
        BadInputError: one is in use.
    """
    for key, (host, port) in ports.items():
        if port is not None:
            _check_free(key, host, port)


def _check_free(key: str, host: str, port: int) -> None:
    """Wait for a port: if the folder's process was killed, its children may still be ending."""
    deadline = time.monotonic() + PATIENCE_S
    while (reason := _why_not(host, port)) is not None:
        if time.monotonic() >= deadline:
            raise BadInputError(f"{key} {port}: cannot be used ({reason}), must be a free port")
        time.sleep(_LOOK_S)


def _why_not(host: str, port: int) -> str | None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: closed connections are no one
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror
    return None
