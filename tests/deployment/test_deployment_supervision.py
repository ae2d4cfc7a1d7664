"""Programs that belong together: started again when they end, ended together, and nobody outlives a killed parent."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from conclave.deployment.host import supervision
from conclave.deployment.host.supervision import Family, Program

SLEEPER = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"]


def pids(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    try:
        return "\nState:\tZ" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def _signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_program_that_ends_is_started_again_and_all_end_together(tmp_path):
    log = tmp_path / "log"
    with Family([Program("sleeper", SLEEPER, log, {})]) as family:
        wait_for(lambda: len(pids(log)) == 1)
        assert log.stat().st_mode & 0o077 == 0
        os.kill(pids(log)[0], signal.SIGKILL)
        wait_for(lambda: len(pids(log)) == 2)
        assert alive(pids(log)[1])
        os.kill(os.getpid(), signal.SIGTERM)
        assert family.stopped.wait(5)
    assert not any(map(alive, pids(log)))


def test_work_that_waits_for_a_program_is_not_waited_for_without_end(tmp_path, monkeypatch):
    """Asked to stop, whoever is in the middle of something gets a while; then what it waits for is ended."""
    monkeypatch.setattr(supervision, "_GRACE_S", 0.1)
    log = tmp_path / "log"
    with Family([Program("sleeper", SLEEPER, log, {})]) as family:
        wait_for(lambda: len(pids(log)) == 1)
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: not alive(pids(log)[0]))  # the work
        wait_for(lambda: family.running() == {"sleeper": False})  # as long as another thread reaps it, it counts
    assert len(pids(log)) == 1


def test_after_a_long_life_a_program_is_started_again_as_soon_as_the_first_time(tmp_path, monkeypatch):
    """It may take 2, 4, 8, … s, and one that ends every month would come to the longest."""
    waits = []
    monkeypatch.setattr(supervision, "_STEADY_S", 0.0)
    family = Family([Program("ends", [sys.executable, "-c", ""], tmp_path / "log", {})])
    stop_after = 4

    class Stopped(threading.Event):
        def wait(self, timeout=None):
            if timeout > supervision._LOOK_S:
                waits.append(timeout)
            if len(waits) == stop_after:
                self.set()
            return super().wait(0.01)

    family.stopped = Stopped()
    with family:
        wait_for(family.stopped.is_set)
    assert waits == [2.0] * stop_after


def test_what_calls_out_is_switched_off(tmp_path):
    log = tmp_path / "log"
    names = ("FLWR_TELEMETRY_ENABLED", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "MINE")
    shown = f"import os; print({{k: os.environ.get(k) for k in {names}}}, flush=True)"
    program = Program("shows", [sys.executable, "-c", f"{shown}; import time; time.sleep(600)"], log, {"MINE": "1"})
    with Family([program]):
        wait_for(lambda: log.exists() and log.read_text().endswith("\n"))
    assert ast.literal_eval(log.read_text()) == dict(zip(names, ("0", "1", "1", "1"), strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent was killed")
def test_nobody_outlives_a_parent_that_is_killed(tmp_path):
    log = tmp_path / "log"
    root = Path(__file__).resolve().parents[2]
    work = (
        f"import sys; sys.path.insert(0, {str(root / 'src')!r}); from pathlib import Path\n"
        "from conclave.deployment.host.supervision import Family, Program\n"
        f"with Family([Program('sleeper', {SLEEPER!r}, Path({str(log)!r}), {{}})]) as family: family.stopped.wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", work])
    wait_for(lambda: pids(log))
    parent.kill()
    parent.wait(30)
    wait_for(lambda: not alive(pids(log)[0]))


def test_a_signal_that_meets_a_wait_stops_it():
    """Between taking the event's lock and letting go of it, a handler that waits for the lock would wait for ever."""
    family = Family([])

    def met() -> None:
        with family.stopped._cond:  # as ``Event.wait`` holds it
            family._on_signal(signal.SIGTERM, None)

    waiting = threading.Thread(target=met, daemon=True)
    waiting.start()
    waiting.join(20)
    assert not waiting.is_alive()
    assert family.stopped.wait(20)
