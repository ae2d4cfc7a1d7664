"""One process for a folder, and ports that are free: a second start would fight with the first one."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from model.errors import BadInputError


@contextmanager
def alone(state: Path, ports: Mapping[str, tuple[str, int | None]]) -> Iterator[None]:
    """Hold a folder for this process within.

    Args:
        state: where a lock is kept.
        ports: configuration key → address and port that will be listened on; None: not at all.

    Raises:
        BadInputError: another process holds it, or a port is in use.
    """
    lock = os.open(state / "running.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BadInputError(f"{state.parent}: is running already, must be stopped first") from error
        for key, (host, port) in ports.items():
            if port is not None:
                _check_free(key, host, port)
        yield
    finally:
        os.close(lock)


def _check_free(key: str, host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as servers do: the remains of a dead one are no one
        try:
            probe.bind((host, port))
        except OSError as error:
            raise BadInputError(f"{key} {port}: cannot be used ({error.strerror}), must be a free port") from error
