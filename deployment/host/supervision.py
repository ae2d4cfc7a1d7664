"""Child processes that belong together: started in order, watched, and ended together."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from conclave.deployment.host.logs import RotatingLog

log = logging.getLogger("conclave.processes")

_LOOK_S = 0.5
_PATIENCE_S = 10.0
_GRACE_S = 20.0
"""Whoever works when all are asked to stop may finish for so long; then what it waits for is ended."""
_LONGEST_PAUSE_S = 15.0
_STEADY_S = 60.0
"""What ran so long before it ended is started again as soon as at the first time."""

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _end_with_parent() -> None:
    """Ask Linux to end this process when the thread that started it ends, even by SIGKILL: nobody is left behind."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@dataclass(frozen=True)
class Program:
    """A program to run. log: the file that gets what it prints. advice: what to do if it ends by itself."""

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str]
    advice: str = ""


def _keep_lines(printed: IO[bytes], path: Path) -> None:
    """Write what a program prints to its log, until it ends."""
    with printed, contextlib.closing(RotatingLog(path)) as kept:
        for line in printed:
            kept.write(line.decode(errors="replace").rstrip("\n"))


class Family:
    """Runs programs until asked to stop; one that ends by itself is started again, after a pause that grows."""

    def __init__(self, programs: Sequence[Program]) -> None:
        self.stopped = threading.Event()
        self._programs = programs
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._deaths: dict[str, int] = {}
        self._started: dict[str, float] = {}
        self._left = threading.Event()
        self._pumps: list[threading.Thread] = []
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Family:
        """Start all; SIGTERM, SIGINT and SIGHUP (a closed terminal) ask to stop."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        for program in self._programs:
            self._start(program)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End all, the last started first."""
        self.stopped.set()
        self._left.set()
        self._watcher.join()
        for program in reversed(self._programs):
            self._end(self._running[program.name])
        for pump in self._pumps:
            pump.join(_PATIENCE_S)

    def running(self) -> dict[str, bool]:
        """Return, by name, whether each program runs."""
        return {name: process.poll() is None for name, process in list(self._running.items())}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # In the main thread, wherever that is: within a wait for ``stopped`` it may hold the lock that ``set`` takes.
        threading.Thread(target=self.stopped.set, daemon=True).start()

    def _start(self, program: Program) -> None:
        process = self._running[program.name] = subprocess.Popen(  # noqa: S603  (our own commands)
            program.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **program.environment},
            start_new_session=True,  # a Ctrl-C in the terminal is for us; we end it in order
            preexec_fn=_end_with_parent,
        )
        assert process.stdout is not None
        pump = threading.Thread(target=_keep_lines, args=(process.stdout, program.log), daemon=True)
        pump.start()
        self._pumps = [*(old for old in self._pumps if old.is_alive()), pump]
        self._started[program.name] = time.monotonic()
        log.info("%s: started", program.name)

    def _watch(self) -> None:
        self._keep_running()
        if not self._left.wait(_GRACE_S):
            log.warning("the work in hand did not end within %.0f s; ending what it waits for", _GRACE_S)
            for program in self._programs:
                self._end(self._running[program.name])

    def _keep_running(self) -> None:
        while not self.stopped.wait(_LOOK_S):
            for program in self._programs:
                status = self._running[program.name].poll()
                if status is None:
                    continue
                steady = time.monotonic() - self._started[program.name] >= _STEADY_S
                deaths = self._deaths[program.name] = 1 if steady else self._deaths.get(program.name, 0) + 1
                log.error("%s: ended with status %d; see %s%s", program.name, status, program.log, program.advice)
                if self.stopped.wait(min(2.0 ** min(deaths, 6), _LONGEST_PAUSE_S)):
                    return
                self._start(program)

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
