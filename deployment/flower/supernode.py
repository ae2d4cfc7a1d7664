"""Flower's SuperNode as a node runs it, in a process of its own.

Started by ``python -P -m conclave.deployment.flower.supernode ARGUMENTS``.

It differs in three ways. It ends with its connection: if that breaks during a TLS handshake, Flower's own gives up
but lives on, for the thread that hands tasks out keeps the process, and nobody starts it again. It keeps pace: Flower's
own looks for a message every 3 s and for an answer every 0.5 s, which is longer than many a round. And it waits for a
minute for the rest of a message, and not at all once its run is over: Flower's own waits for two hours where a server
was killed in the middle, and does not take back the task of a message whose run was stopped in the middle.

This uses Flower's inside; ``node start`` has checked its version.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import entry_points

from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, pull_objects
from flwr.supercore.run import RunNotRunningException
from flwr.supernode import start_client_internal

PATIENCE_S = 60.0
"""How long a part of a message may be missing."""

_IDLE_S = 3.0
_BUSY_S = 0.3
_ANSWER_S = 0.05
_STILL_BUSY_S = 60.0


class Pace:
    """Replaces the module :mod:`time` in Flower's loop: quick while there are messages, otherwise like Flower's own.

    The loop sleeps 3 s if there is no message and 0.5 s while one is being answered.
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


def pull_whole(object_ids: list[str], pull_object_fn: Callable[[str], bytes]) -> dict[str, bytes]:
    """Fetch the parts of a message as Flower does, id → content.

    Raises:
        ObjectPullError: a part did not come within :data:`PATIENCE_S`, or the run is over. Flower's loop then takes the
            message and its task back, which it does for no other error.
    """
    try:
        return pull_objects(object_ids, pull_object_fn, max_time=PATIENCE_S)
    except RunNotRunningException as error:
        raise ObjectPullError(object_ids[0], "its run is over") from error


def main() -> None:
    """Run it with this process's arguments, and do not outlive it."""
    sys.argv[0] = "flower-supernode"
    (script,) = entry_points(group="console_scripts", name=sys.argv[0])
    run = script.load()
    start_client_internal.pull_objects = pull_whole  # type: ignore[assignment, attr-defined]
    start_client_internal.time = Pace()  # type: ignore[assignment, attr-defined]
    run()
    sys.stderr.write("the connection to the server is lost\n")
    sys.stderr.flush()
    os._exit(1)  # a thread would keep the process


if __name__ == "__main__":
    main()
