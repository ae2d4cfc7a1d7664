"""A deployed node that answers one message in a process of its own, and may be killed at any step of it.

The process is a forked copy of the test's. It counts its own steps and sends itself SIGKILL at a chosen one, so the
moments are exact and every failure can be repeated. The production code knows nothing of this.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from unittest import mock

from conftest import make_batch
from flwr.app import Context, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.supercore.task_identity import TaskIdentity
from ledger_samples import KEY, MACHINE, genesis
from node_samples import HELD, body
from plan_samples import plan, request
from safetensors.torch import save

import conclave
import conclave.clients.node
from conclave.base.canonical import sha256
from conclave.clients.app import make_client_app
from conclave.clients.node import Node
from conclave.clients.policy import Policy
from conclave.clients.trainer import train
from conclave.data.values.schema import ImageSchema
from conclave.model import parameters
from conclave.privacy.ledger import ChargeRequest, Entry, Ledger
from conclave.privacy.ledger.witness import Witness
from conclave.privacy.randomness import fresh_secret
from conclave.protocol.codec import body_of, decode, encode, unpack
from conclave.protocol.messages import TRAIN, TrainReply, TrainRequest
from conclave.protocol.plan import Plan

ROOT = Path(conclave.__file__).parent
WATCHED = tuple(
    str(ROOT / name)
    for name in (
        "privacy/ledger/", "privacy/releases/release.py", "clients/node.py",
        "clients/node_ledger.py", "protocol/charges.py", "clients/app.py", "base/whole_file.py",
    )
)  # fmt: skip
"""Where every single line is a step: from the message to the reply, all that decides what is charged and sent. The
witness is written in ``base/whole_file.py``."""

Step = tuple[str, int]
Tracer = Callable[[Callable[[Step], None]], None]
"""Installs something that reports each step of this process before it happens."""


def lines(report: Callable[[Step], None]) -> None:
    """Steps are the lines of the watched files, and of the sending."""
    own = (answer.__code__, transmit.__code__)

    def enter(frame: FrameType, event: str, argument: object):
        return inside if frame.f_code in own or frame.f_code.co_filename.startswith(WATCHED) else None

    def inside(frame: FrameType, event: str, argument: object):
        if event == "line":
            report((frame.f_code.co_filename, frame.f_lineno))
        return inside

    sys.settrace(enter)


def calls(report: Callable[[Step], None]) -> None:
    """Steps are all calls and returns anywhere, of functions in C too."""
    sys.setprofile(lambda frame, event, argument: report((frame.f_code.co_filename, frame.f_lineno)))


def entering(code: CodeType) -> Tracer:
    """Steps are the calls of one function, with nothing of it done yet."""

    def install(report: Callable[[Step], None]) -> None:
        def watch(frame: FrameType, event: str, argument: object) -> None:
            if event == "call" and frame.f_code is code:
                report((frame.f_code.co_filename, frame.f_lineno))

        sys.setprofile(watch)

    return install


def steps_of(tracer: Tracer, work: Callable[[], object]) -> list[Step]:
    """Return the steps of doing ``work`` undisturbed, in this process."""
    steps: list[Step] = []
    try:
        tracer(steps.append)
        work()
    finally:
        sys.settrace(None)
        sys.setprofile(None)
    return steps


@dataclass(frozen=True)
class Kill:
    """SIGKILL just before the given step, counted from 1. A process that has fewer steps survives."""

    step: int
    tracer: Tracer = lines

    def arm(self, tell: Callable[[str, object], None]) -> None:
        left = self.step

        def report(step: Step) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                sys.settrace(None)
                sys.setprofile(None)
                tell("died", step)
                os.kill(os.getpid(), signal.SIGKILL)

        self.tracer(report)


@dataclass(frozen=True)
class Life:
    """What a child left behind.

    sent: what it wrote to the outside, empty if it was killed before. told: what the spies in it reported, by kind.
    """

    sent: bytes
    killed: bool
    told: dict[str, list]


class Child:
    """A forked copy of this process at work. Nothing it does changes this one's memory.

    This process must not have a ledger open that the child opens: SQLite's locks do not survive a fork.
    """

    def __init__(self, work: Callable[[Callable[[bytes], None], Callable[[str, object], None]], None]) -> None:
        """Begin; ``work`` gets two functions: one sends bytes to the outside, one tells this process something."""
        self._sent, sending = os.pipe()
        self._told, telling = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                work(
                    lambda data: _write(sending, data),
                    lambda kind, value: _write(telling, json.dumps([kind, value]).encode() + b"\n"),
                )
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(sending)
        os.close(telling)

    def hear(self) -> str:
        """Wait for the next thing it tells; return its kind, or nothing when it has ended."""
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(self._told, 1)
            if not byte:
                return ""
            line += byte
        return json.loads(line)[0]

    def end(self) -> Life:
        """Wait for the end."""
        with os.fdopen(self._sent, "rb") as stream:
            sent = stream.read()
        told: dict[str, list] = {}
        with os.fdopen(self._told, "rb") as stream:
            for line in stream:
                kind, value = json.loads(line)
                told.setdefault(kind, []).append(value)
        _, status = os.waitpid(self.pid, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed or status == 0, "the child failed, see its standard error"
        return Life(sent, killed, told)


def _write(pipe: int, data: bytes) -> None:
    while data:
        data = data[os.write(pipe, data) :]


def run_to_death(work: Callable[[], object], kill: Kill | None) -> Life:
    """Do ``work`` in a child, killed as asked; it sends ``done`` if it survives."""

    def live(send: Callable[[bytes], None], tell: Callable[[str, object], None]) -> None:
        if kill is not None:
            kill.arm(tell)
        work()
        send(b"done")

    return Child(live).end()


@cache
def adaptive_plan() -> Plan:
    """An adaptive bound leaves local state on the node, which must switch together with the reply."""
    privacy = {"epsilon": 8.0, "delta": 1e-5, "clip": 1.0, "sampling_rate": 0.5, "clipping": "adaptive"}
    return plan(privacy=privacy)


@cache
def weights() -> bytes:
    return body()


def asked(**changes) -> TrainRequest:
    return request(**({"held": HELD, "plan": adaptive_plan()} | changes))


def on_the_wire(content: RecordDict) -> bytes:
    return recorddict_to_proto(content).SerializeToString(deterministic=True)


def off_the_wire(data: bytes) -> RecordDict:
    return recorddict_from_proto(ProtoRecordDict.FromString(data))


def message(train_request: TrainRequest, sent: bytes | None = None) -> bytes:
    return on_the_wire(encode(train_request, weights() if sent is None else sent))


def answer_of(sent: bytes) -> tuple[TrainReply, bytes]:
    """Read a reply; a refusal raises with its code."""
    content = off_the_wire(sent)
    return decode(content, TrainReply), body_of(content)


def witness_of(folder: Path) -> Witness:
    return Witness(folder / "elsewhere" / "witness")


def create_node(folder: Path, **options) -> None:
    """Set a deployed node up."""
    document = genesis(mode="deployment", **options)
    Ledger.create(folder / "ledger.db", document, KEY, witness=witness_of(folder)).close()


def open_node(folder: Path) -> Node:
    """Open the node as it is opened after every start."""
    return Node(
        records=make_batch(40),
        schema=ImageSchema(image=(1, 8, 8), classes=5),
        declared_size=40,
        policy=Policy(),
        ledger=Ledger(folder / "ledger.db", KEY, witness=witness_of(folder), machine=MACHINE),
        new_secret=lambda _: fresh_secret(),
    )


def answer(folder: Path, data: bytes, node: Node | None = None) -> bytes:
    """What a node's process does with a message: from the wire through Flower's ClientApp back to the wire.

    node: the one that the process opened before; otherwise it is opened for the message.
    """
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SUPERLINK_NODE_ID, 0
    context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
    received = Message(off_the_wire(data), dst_node_id=2, message_type=TRAIN, group_id="1")
    app = make_client_app(lambda _: node or open_node(folder))
    return on_the_wire(app(received, context).content)


def transmit(send: Callable[[bytes], None], reply: bytes) -> None:
    """Send a reply; the last line is there to be killed at."""
    send(reply)
    del reply


@contextmanager
def spied_on(tell: Callable[[str, object], None]) -> Iterator[None]:
    """Tell which secrets are drawn, and with which one training is about to touch the records."""

    def draw() -> bytes:
        secret = os.urandom(32)
        tell("drawn", secret.hex())
        return secret

    def train_(*arguments, **options):
        tell("trained", arguments[5].hex())
        return train(*arguments, **options)

    with mock.patch(f"{__name__}.fresh_secret", draw), mock.patch.object(conclave.clients.node, "train", train_):
        yield


def begin(folder: Path, data: bytes, kill: Kill | None = None, patch=None) -> Child:
    """Deliver a message to a new process of the node.

    patch: what to enter in that process first: tell → context manager.
    """

    def live(send: Callable[[bytes], None], tell: Callable[[str, object], None]) -> None:
        with spied_on(tell), patch(tell) if patch is not None else mock.MagicMock():
            if kill is not None:
                kill.arm(tell)
            transmit(send, answer(folder, data))

    return Child(live)


def deliver(folder: Path, data: bytes, kill: Kill | None = None, patch=None) -> Life:
    """Deliver a message and wait for the end of the process."""
    return begin(folder, data, kill, patch).end()


@dataclass(frozen=True)
class Expected:
    """What the first secret of a charge gives: the released bytes, and the clip bound that stays on the node."""

    body: bytes
    clip: bytes


def expected(train_request: TrainRequest, secret: bytes, start: bytes | None) -> Expected:
    """Train without node and ledger."""
    tensors = unpack(weights(), parameters.shapes(train_request.plan.model, HELD))
    trained = train(
        train_request.plan, HELD, tensors, make_batch(40), 40, secret, clip=None if start is None else float(start)
    )
    ordered = {name: trained.delta[name].contiguous() for name in sorted(trained.delta)}
    return Expected(save(ordered), repr(trained.clip).encode())


def charge_id_of(train_request: TrainRequest, ledger_id: str) -> str:
    """Compute the id of the charge that pays for a request, from the definition."""
    model_in = sha256(train_request.model_dump_json(include={"held"}).encode() + weights())
    values = dict.fromkeys(("code_hash", "mechanism", "clip", "releases", "numeric", "rng"))
    return ChargeRequest(
        kind="train", run_id=train_request.run_id, round=train_request.round, plan_hash=train_request.plan.hash,
        model_in_hash=model_in, **values,
    ).charge_id(ledger_id)  # fmt: skip


@contextmanager
def scratch_copy(folder: Path) -> Iterator[Path]:
    """Copy the files as a crash left them: looking at them must not repair them."""
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(shutil.copytree(folder, Path(scratch) / "copy"))


@dataclass(frozen=True)
class Remains:
    """One charge, as the files state it."""

    entries: list[Entry]
    states: list[str]
    secret: bytes | None
    attempts: int
    reply: bytes | None
    clip: bytes | None

    def entry(self, charge_id: str, state: str) -> Entry:
        (found,) = [entry for entry in self.entries if (entry.charge_id, entry.state) == (charge_id, state)]
        return found


def remains(folder: Path, train_request: TrainRequest, charge_id: str) -> Remains:
    """Read what a dead process left, without the code that is tested."""
    with scratch_copy(folder) as copy:
        db = sqlite3.connect(copy / "ledger.db")
        entries = [Entry.parse(body) for (body,) in db.execute("SELECT body FROM entries ORDER BY seq")]
        row = db.execute("SELECT secret, attempts FROM secrets WHERE charge_id = ?", (charge_id,)).fetchone()
        reply = db.execute("SELECT body FROM replies WHERE charge_id = ?", (charge_id,)).fetchone()
        name = f"run/{train_request.run_id}/{train_request.plan.hash}/clip"
        clip = db.execute("SELECT body FROM local_state WHERE name = ?", (name,)).fetchone()
        db.close()
    return Remains(
        entries,
        [entry.state for entry in entries if entry.charge_id == charge_id],
        *(row or (None, 0)),
        None if reply is None else reply[0],
        None if clip is None else clip[0],
    )
