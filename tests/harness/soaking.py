"""What the soak tests share: a federation with room for many short runs, and the books that must balance after each."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from federation import NODES, SCENARIO, Command, Federation

from conclave.privacy.ledger.entry import Entry
from conclave.privacy.ledger.reading.history import LedgerFile
from conclave.server.replies.receipts import read_receipts
from conclave.server.run_directory import RunDirectory

BUDGET = 32.0
"""ε of each node: a run takes 1, see :func:`train`."""


@contextmanager
def serving(folder: Path) -> Iterator[Federation]:
    """A server without nodes, and a scenario."""
    made = Federation(folder)
    try:
        made.serve()
        (made.folder / "patients.toml").write_text(SCENARIO.format(features=13).partition("[evaluation]")[0])
        yield made
    finally:
        made.end_all()


def add_node(federation: Federation, name: str, **options: Any) -> None:
    """Make a node that lets any plan run."""
    federation.create_node(name, epsilon=BUDGET, **options)
    federation.edit_node(name, "# unapproved_plans = true", "unapproved_plans = true")


def supernode_log(federation: Federation, name: str) -> str:
    """What a node's SuperNode has said, in all its lives."""
    path = federation.folder / name / "state" / "supernode.log"
    return path.read_text() if path.exists() else ""


def connected(federation: Federation, name: str) -> bool:
    """Whether a node's SuperNode, in the life that it leads now, was let in by the server."""
    return "SuperNode ID" in supernode_log(federation, name).rpartition("Starting Flower SuperNode")[2]


def start_again(federation: Federation, name: str, **environment: str) -> None:
    """Start a node; what its SuperNode said before is forgotten."""
    (federation.folder / name / "state" / "supernode.log").unlink(missing_ok=True)
    federation.start(name, "node", "start", name, **environment)


def start_in_vain(federation: Federation, name: str, **environment: str) -> None:
    """Start a node that the server does not let in."""
    before = federation.log(name) if (federation.folder / f"{name}.log").exists() else ""
    start_again(federation, name, **environment)
    federation.wait_for("a refusal", lambda: "supernode: ended" in federation.log(name)[len(before) :])
    assert not connected(federation, name)


def kill(federation: Federation, name: str) -> None:
    """End a process that cannot help it."""
    os.killpg(federation.running[name].pid, signal.SIGKILL)
    federation.running.pop(name).wait(30)


def asked(name: str, rounds: int, timeout_s: float = 60.0) -> list[object]:
    """Return the arguments of a short run called ``name``."""
    changes = {
        "name": f'"{name}"', "privacy.epsilon": 1.0, "federation.rounds": rounds,
        "federation.reply_timeout_s": timeout_s,
    }  # fmt: skip
    options = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    return ["train", "patients.toml", *options, "--superlink", "server/operator"]


def begin(federation: Federation, name: str, rounds: int, timeout_s: float = 60.0) -> Command:
    """Begin a run, and wait for its first round, in which everybody takes part: what was before is over."""
    command = federation.begin(*asked(name, rounds, timeout_s))
    federation.wait_for("round 1", lambda: said_round(command, 1))
    assert f"round 1 of {rounds}: 3 of 3 replies" in command.said
    return command


def said_round(command: Command, number: int) -> bool:
    return f"round {number} of" in command.said


def run_of(federation: Federation, name: str) -> RunDirectory:
    return RunDirectory(federation.folder / "server" / "runs" / name)


def charges(federation: Federation, node: str, run_id: str) -> Counter[int]:
    """Return how often a run's rounds were charged to a node: round → charges."""
    lines = LedgerFile(federation.folder / node / "state" / "ledger.db").lines()
    entries = [Entry.parse(line) for line in lines]
    return Counter(entry.round for entry in entries if entry.state == "RESERVED" and entry.run_id == run_id)


def balanced(federation: Federation, name: str, nodes: Sequence[str] = NODES) -> dict[str, Counter[int]]:
    """Check a run's books, and return the charges by node.

    Every receipt is a committed charge with that very output, no round is charged twice, no budget is overspent.
    """
    run = run_of(federation, name)
    ledgers = [str(federation.folder / node / "state" / "ledger.db") for node in nodes]
    others = [str(other) for other in sorted(run.path.parent.iterdir()) if other != run.path]
    options = [part for path in ledgers for part in ("--ledger", path)]
    options += [part for path in others for part in ("--also", path)]  # the same ledgers paid for them
    found = json.loads(federation.must("audit", "run", run.path, *options, "--json").splitlines()[-1])
    assert (found["verdict"], found["findings"]) == ("NOT_REFUTED", [])
    receipts = list(read_receipts(run.receipts))
    assert found["matched"] == found["receipts"] == len(receipts) == sum(line["accepted"] for line in run.metrics())
    (run_id,) = {kept.run_id for kept in receipts}
    charged = {node: charges(federation, node, run_id) for node in nodes}
    assert max(count for rounds in charged.values() for count in rounds.values()) == 1
    assert found["unreceived"] <= sum(charged[node].total() for node in nodes) - len(receipts)
    for node in nodes:
        budget = json.loads(federation.must("node", "budget", node, "--json").splitlines()[-1])["budget"]
        assert budget["spent"] <= budget["epsilon"] == BUDGET
    return charged


class Wire:
    """A TCP forwarder on loopback that can be cut: connections end, and new ones after a word, until it is mended.

    A TLS handshake breaks there, as where a firewall in the middle of the way has lost its own way on.
    """

    def __init__(self, to: int) -> None:
        self._to = to
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._ends: set[socket.socket] = set()
        self._whole = True
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._whole = False
        for end in list(self._ends):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._whole = True

    def close(self) -> None:
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                meet = self._join if self._whole else _hear_and_hang_up
                threading.Thread(target=meet, args=(near,), daemon=True).start()

    def _join(self, near: socket.socket) -> None:
        with closing(near), suppress(OSError), socket.create_connection(("127.0.0.1", self._to)) as far:
            self._ends |= {near, far}
            back = threading.Thread(target=_pour, args=(far, near), daemon=True)
            back.start()
            _pour(near, far)
            back.join()
            self._ends -= {near, far}


def _hear_and_hang_up(near: socket.socket) -> None:
    with closing(near), suppress(OSError):
        near.recv(1 << 16)  # what is not read would make a reset of the end


def _pour(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)
