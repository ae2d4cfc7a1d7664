"""Follow a run on a server until it is over."""

from __future__ import annotations

import time
from collections.abc import Callable

from conclave.deployment.operator.flower_control import Control, ListedRun

_LOOK_S = 0.5


def follow(control: Control, run_id: int, say: Callable[[str], None]) -> ListedRun:
    """Say what the run says, line by line, and return how it ended."""
    for line in control.said(run_id):
        say(line)
    while not (found := control.runs(run_id)[0]).finished:
        time.sleep(_LOOK_S)
    return found
