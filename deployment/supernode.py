"""Flower's SuperNode as a node runs it: ``python -P -m deployment.supernode ARGUMENTS``, in a process of its own.

It differs in three things. It ends with its connection: where that breaks during a TLS handshake, Flower's own gives up
but lives on, for the thread that hands tasks out keeps the process, and nobody starts it again. And it keeps pace:
Flower's own looks for a message every 3 s and for an answer every 0.5 s, which is longer than many a round. And it waits
a minute for the rest of a message: where the server was killed in the middle, the rest never comes, and Flower's own
waits for two hours, without looking for others.

Beside :mod:`deployment.flower_runtime` this is the only use of Flower's inside; ``node start`` has checked the version.
"""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from importlib.metadata import entry_points

from flwr.supercore.inflatable.inflatable_utils import pull_objects
from flwr.supernode import start_client_internal

PATIENCE_S = 60.0
"""How long a part of a message may be missing."""

_IDLE_S = 3.0
_BUSY_S = 0.3
_ANSWER_S = 0.05
_STILL_BUSY_S = 60.0


class Pace:
    """Stands for the module :mod:`time` in Flower's loop: quick while there are messages, as Flower's own otherwise.

    The loop sleeps 3 s where there is no message and 0.5 s while one is being answered.
    """

    def __init__(self) -> None:
        self._busy_until = 0.0

    def sleep(self, seconds: float) -> None:
        """Sleep, but not longer than is needed to keep pace."""
        now = time.monotonic()
        if seconds < _IDLE_S:
            self._busy_until = now + _STILL_BUSY_S
            time.sleep(min(seconds, _ANSWER_S))
        else:
            time.sleep(min(seconds, _BUSY_S) if now < self._busy_until else seconds)

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)


def main() -> None:
    """Run it with this process's arguments, and do not outlive it."""
    sys.argv[0] = "flower-supernode"
    (script,) = entry_points(group="console_scripts", name=sys.argv[0])
    run = script.load()
    start_client_internal.pull_objects = partial(pull_objects, max_time=PATIENCE_S)  # type: ignore[attr-defined]
    start_client_internal.time = Pace()  # type: ignore[assignment, attr-defined]
    run()
    sys.stderr.write("the connection to the server is lost\n")
    sys.stderr.flush()
    os._exit(1)  # a thread would keep the process


if __name__ == "__main__":
    main()
