"""A process that stands still before chosen steps of its work, so that others can look at what it has written so far.

Its files are then as a kill at that moment would leave them: what is not with the operating system by now would be
lost, and what is stays. So one process shows as many deaths as it has steps.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Self

from mortal_node import Step, lines


class Stops:
    """The stops of a forked copy of this process at work, each before a chosen step's first turn.

    Iterating lets it go on to its next stop. Leaving the block ends it, wherever it is.

    This process must not have a ledger open that the child opens: SQLite's locks do not survive a fork.
    """

    def __init__(self, work: Callable[[], object], is_chosen: Callable[[Step], bool]) -> None:
        """Begin; the child stands still before its first chosen step."""
        self.seen: list[Step] = []
        reading, self._told = os.pipe()
        self._stream = os.fdopen(reading, "rb")
        self._pid: int | None = os.fork()
        if self._pid == 0:
            self._live(work, is_chosen)
        os.close(self._told)

    def _live(self, work: Callable[[], object], is_chosen: Callable[[Step], bool]) -> None:
        seen: set[Step] = set()

        def stop(step: Step) -> None:
            if step not in seen and is_chosen(step):
                seen.add(step)
                os.write(self._told, json.dumps(step).encode() + b"\n")
                os.kill(os.getpid(), signal.SIGSTOP)

        status = 1
        try:
            lines(stop)
            work()
            status = 0
        except BaseException:
            sys.settrace(None)
            traceback.print_exc()
        finally:
            os._exit(status)

    def __enter__(self) -> Self:
        return self

    def __iter__(self) -> Iterator[Step]:
        while self._pid is not None:
            _, status = os.waitpid(self._pid, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                self._pid = None
                assert status == 0, "the child failed, see its standard error"
                return
            file, line = json.loads(self._stream.readline())
            self.seen.append((file, line))
            yield file, line
            if self._pid is not None:
                os.kill(self._pid, signal.SIGCONT)

    def kill(self) -> None:
        """End the child without a chance to do anything more."""
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = None

    def __exit__(self, *error: object) -> None:
        self.kill()
        self._stream.close()
