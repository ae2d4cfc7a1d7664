"""A pool of worker processes behind the inline engine's grid."""

from __future__ import annotations

import itertools
import json
import math
import os
import selectors
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from flwr.app import ArrayRecord, Message, RecordDict

import conclave
from conclave.simulations.engines.frames import Channel, Frame, content_of, document_of
from conclave.simulations.engines.shared_slots import SlotReader, SlotWriter, anonymous_file
from conclave.simulations.engines.worker import KEPT_BROADCASTS

_AT_HAND = 2  # messages a worker gets for each reply of its last batch, so that it never waits for the next batch
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
"""For glibc: a worker needs the same memory for every message; giving it back means as many page faults each time."""
_names = itertools.count(1)  # one count for all pools: an array keeps the name it was given


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    channel: Channel
    requests: SlotWriter
    replies: SlotReader
    waiting: dict[int, Message] = field(default_factory=dict)
    broadcasts: deque[int] = field(default_factory=lambda: deque(maxlen=KEPT_BROADCASTS))


class WorkerPool:
    """Hands messages to whichever worker is free; which one does not change any result.

    Use as a context manager: leaving it closes the sockets, at which the workers end.
    """

    def __init__(self, workers: int, app_path: str, *, run_id: int, nodes: int, run_config: dict[str, str]) -> None:
        """Start ``workers`` processes that import the ClientApp ``module:name``."""
        hello = Frame({"run_id": run_id, "nodes": nodes}, json.dumps(run_config))
        self._workers = [_start(app_path) for _ in range(workers)]
        for worker in self._workers:
            worker.channel.send(hello)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.channel.connection.close()
            worker.requests.close()
            worker.replies.close()
        for worker in self._workers:
            worker.process.wait(timeout=60)

    def run(self, messages: Iterable[tuple[int, Message]]) -> Iterator[Message]:
        """Yield the replies to (node number, message) pairs as they come.

        Raises:
            RuntimeError: a worker died; what it printed is on stderr.
        """
        todo = deque(messages)
        with selectors.DefaultSelector() as ready:
            for worker in self._workers:
                ready.register(worker.channel.connection, selectors.EVENT_READ, worker)
                self._feed(worker, todo, _AT_HAND)
            while any(worker.waiting for worker in self._workers):
                for key, _ in ready.select():
                    yield from self._collect(key.data, todo)

    def _feed(self, worker: _Worker, todo: deque[tuple[int, Message]], at_hand: int) -> None:
        """Let a worker have ``at_hand`` messages to answer, but at most its share, so that workers finish together."""
        left = len(todo) + sum(len(other.waiting) for other in self._workers)
        share = min(at_hand, math.ceil(left / len(self._workers)))
        frames = [self._request(worker, *todo.popleft()) for _ in range(min(share - len(worker.waiting), len(todo)))]
        if frames:
            worker.channel.send(*frames)

    def _request(self, worker: _Worker, number: int, message: Message) -> Frame:
        metadata = message.metadata
        sent = int(metadata.message_id.removeprefix("inline-"))
        header = {
            "number": number,
            "sent": sent,
            "type": metadata.message_type,
            "group": metadata.group_id,
            "created_at": metadata.created_at,
            "ttl": metadata.ttl,
            "freed": worker.replies.freed(),
            **self._broadcast(worker, message.content),
        }
        worker.waiting[sent] = message
        return Frame(header, document_of(message.content))

    def _broadcast(self, worker: _Worker, content: RecordDict) -> dict[str, Any]:
        """Name the content's tensors; send a worker what it was never sent, or was sent long ago."""
        record = content.get("tensors")
        array = record.get("body") if isinstance(record, ArrayRecord) else None
        if array is None:
            return {"broadcast": None}
        name = array.__dict__.setdefault("_pool_name", next(_names))
        if name in worker.broadcasts:
            return {"broadcast": name}
        worker.broadcasts.append(name)
        return {"broadcast": name, "place": worker.requests.write(array)}

    def _collect(self, worker: _Worker, todo: deque[tuple[int, Message]]) -> Iterator[Message]:
        frames = worker.channel.receive_all()
        if not frames:
            raise RuntimeError(f"a worker process ended with status {worker.process.wait(timeout=60)}")
        requests = [worker.waiting.pop(frame.header["sent"]) for frame in frames]
        for frame in frames:
            worker.requests.free(frame.header["freed"])
        self._feed(worker, todo, _AT_HAND * len(frames))  # before anything else: the worker may be waiting
        for frame, request in zip(frames, requests, strict=True):
            place = frame.header.get("place")
            content = content_of(frame.document, None if place is None else worker.replies.read(place))
            yield Message(content, reply_to=request)


def _start(app_path: str) -> _Worker:
    ours, theirs = socket.socketpair()
    requests, replies = anonymous_file(), anonymous_file()
    root = str(Path(conclave.__file__).resolve().parents[1])
    environment = _KEEP_MEMORY | os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with theirs:
        inherited = (theirs.fileno(), requests, replies)
        process = subprocess.Popen(  # noqa: S603  (our own interpreter and module)
            [sys.executable, "-m", "conclave.simulations.engines.worker", *map(str, inherited), app_path],
            pass_fds=inherited,
            env=environment,
        )
    return _Worker(process, Channel(ours), SlotWriter(requests), SlotReader(replies))
