"""A pool of worker processes behind the inline engine's grid."""

from __future__ import annotations

import itertools
import json
import os
import selectors
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from clients.protocol import encode_tensors
from simulations.frames import Frame, receive_frame, send_frame, without_tensors
from simulations.shared_slots import SlotReader, anonymous_file

_IN_FLIGHT = 2  # messages a worker has at hand, so that it never waits for the next


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: socket.socket
    replies: SlotReader
    waiting: dict[int, Message] = field(default_factory=dict)
    broadcasts: deque[int] = field(default_factory=lambda: deque(maxlen=4))


class WorkerPool:
    """Hands messages to whichever worker is free; which one does not change any result.

    Use as a context manager: leaving it closes the sockets, at which the workers end.
    """

    def __init__(self, workers: int, app_path: str, *, run_id: int, nodes: int, run_config: dict[str, str]) -> None:
        """Start ``workers`` processes that import the ClientApp ``module:name``."""
        hello = Frame(
            {"run_id": run_id, "nodes": nodes}, RecordDict({"run_config": ConfigRecord(dict(run_config))}), None, 0
        )
        self._workers = [_start(app_path) for _ in range(workers)]
        for worker in self._workers:
            send_frame(worker.connection, hello)
        self._names = itertools.count(1)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.connection.close()
            worker.replies.close()
        for worker in self._workers:
            worker.process.wait(timeout=60)

    def run(self, messages: Iterable[tuple[int, Message]]) -> Iterator[Message]:
        """Yield the replies to (node number, message) pairs as they come.

        Raises:
            RuntimeError: a worker died; what it printed is on stderr.
        """
        todo = iter(messages)
        with selectors.DefaultSelector() as ready:
            for worker in self._workers:
                ready.register(worker.connection, selectors.EVENT_READ, worker)
            for _ in range(_IN_FLIGHT):
                for worker in self._workers:
                    self._feed(worker, todo)
            while any(worker.waiting for worker in self._workers):
                for key, _ in ready.select():
                    yield self._collect(key.data, todo)

    def _feed(self, worker: _Worker, todo: Iterator[tuple[int, Message]]) -> None:
        pair = next(todo, None)
        if pair is None:
            return
        number, message = pair
        sent = int(message.metadata.message_id.removeprefix("inline-"))
        header: dict[str, int | str] = {
            "number": number,
            "sent": sent,
            "type": message.metadata.message_type,
            "group": message.metadata.group_id,
            "created_at": str(message.metadata.created_at),
            "ttl": str(message.metadata.ttl),
        }
        blob, blob_id = self._blob(worker, message.content)
        send_frame(worker.connection, Frame(header, without_tensors(message.content), blob, blob_id))
        worker.waiting[sent] = message

    def _blob(self, worker: _Worker, content: RecordDict) -> tuple[bytes | None, int]:
        record = content.get("tensors")
        array = record.get("body") if isinstance(record, ArrayRecord) else None
        if array is None:
            return None, 0
        name = array.__dict__.setdefault("_pool_name", next(self._names))
        if name in worker.broadcasts:
            return None, name
        worker.broadcasts.append(name)
        return array.data, name

    def _collect(self, worker: _Worker, todo: Iterator[tuple[int, Message]]) -> Message:
        frame = receive_frame(worker.connection)
        if frame is None:
            raise RuntimeError(f"a worker process ended with status {worker.process.wait(timeout=60)}")
        request = worker.waiting.pop(int(frame.header["sent"]))
        content = RecordDict(dict(frame.record.items()))
        if "at" in frame.header:  # read before the worker is given more, which frees the slot
            content["tensors"] = encode_tensors(_tensors(worker.replies, frame.header))
        self._feed(worker, todo)
        return Message(content, reply_to=request)


def _tensors(replies: SlotReader, header: Mapping[str, int | str]) -> bytes | dict[str, Tensor]:
    """Packed tensors, as a ledger stored them, or tensors that were never packed."""
    at = int(header["at"])
    if "shapes" in header:
        return replies.read_tensors(at, json.loads(str(header["shapes"])))
    return replies.read(at, int(header["size"]))


def _start(app_path: str) -> _Worker:
    ours, theirs = socket.socketpair()
    shared_file = anonymous_file()
    root = str(Path(__file__).resolve().parent.parent)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with theirs:
        process = subprocess.Popen(  # noqa: S603  (our own interpreter and module)
            [
                sys.executable,
                "-m",
                "simulations.worker",
                *map(str, (theirs.fileno(), shared_file, _IN_FLIGHT)),
                app_path,
            ],
            pass_fds=[theirs.fileno(), shared_file],
            env=environment,
        )
    return _Worker(process, ours, SlotReader(shared_file))
