"""A worker process of the inline engine: answers messages for any node, with one thread.

Run as ``python -m conclave.simulations.engines.worker SOCKET REQUESTS REPLIES APP``: a connected socket and two shared
files it inherits, for the tensors of either direction, and the ClientApp to import.
"""

from __future__ import annotations

import json
import pkgutil
import socket
import sys
import time
from collections import OrderedDict

import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.app.metadata import Metadata
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID

from conclave.privacy.training.noise_ahead import keep_to_one_core
from conclave.protocol.codec import array_of, encode_tensors
from conclave.simulations.engines.frames import Channel, Frame, content_of, document_of
from conclave.simulations.engines.shared_slots import SlotReader, SlotWriter

KEPT_BROADCASTS = 4  # the pool counts along: it names what a worker still has instead of sending it
_HOLD_SECONDS = 0.005  # a reply may wait so long for others: waking the pool costs more than reading a reply


class Worker:
    """Keeps one context per node and the last broadcasts."""

    def __init__(self, app: ClientApp, hello: Frame, requests: SlotReader, replies: SlotWriter) -> None:
        self._app = app
        self._requests = requests
        self._replies = replies
        self._run_id = int(hello.header["run_id"])
        self._nodes = int(hello.header["nodes"])
        self._run_config: dict[str, str] = json.loads(hello.document or "{}")
        self._contexts: dict[int, Context] = {}
        self._broadcasts: OrderedDict[int, ArrayRecord] = OrderedDict()

    def answer(self, frame: Frame) -> Frame:
        """Run the ClientApp on one message and return its reply."""
        number = int(frame.header["number"])
        self._replies.free(frame.header["freed"])
        content = content_of(frame.document, self._tensors(frame))
        reply = self._app(self._message(frame, number, content), self._context(number)).content
        header = {"sent": frame.header["sent"], "freed": self._requests.freed()}
        if "tensors" in reply:
            header["place"] = self._replies.write(array_of(reply))
        return Frame(header, document_of(reply))

    def _tensors(self, frame: Frame) -> ArrayRecord | None:
        name: int | None = frame.header["broadcast"]
        if name is None:
            return None
        if "place" in frame.header:
            self._broadcasts[name] = encode_tensors(self._requests.read(frame.header["place"]))
            if len(self._broadcasts) > KEPT_BROADCASTS:
                self._broadcasts.popitem(last=False)
        return self._broadcasts[name]

    def _message(self, frame: Frame, number: int, content: RecordDict) -> Message:
        metadata = Metadata(
            run_id=self._run_id,
            message_id=f"inline-{frame.header['sent']}",
            src_node_id=SUPERLINK_NODE_ID,
            dst_node_id=SUPERLINK_NODE_ID + 1 + number,
            reply_to_message_id="",
            group_id=frame.header["group"],
            created_at=frame.header["created_at"],
            ttl=frame.header["ttl"],
            message_type=frame.header["type"],
        )
        message: Message = Message(metadata=metadata, content=content)  # type: ignore[call-overload]  # Flower's own use
        return message

    def _context(self, number: int) -> Context:
        if number not in self._contexts:
            self._contexts[number] = Context(
                run_id=self._run_id,
                node_id=SUPERLINK_NODE_ID + 1 + number,
                node_config={"partition-id": number, "num-partitions": self._nodes},
                state=RecordDict(),
                run_config=dict(self._run_config),
            )
        return self._contexts[number]


def main(descriptor: str, request_file: str, reply_file: str, app_path: str) -> None:
    """Answer messages until the other side closes.

    Quick replies are sent several at a time, slow ones one by one, and none waits while there
    is nothing else to answer.
    """
    torch.set_num_threads(1)
    keep_to_one_core()
    app = pkgutil.resolve_name(app_path)
    with socket.socket(fileno=int(descriptor)) as connection:
        channel = Channel(connection)
        hello = channel.receive()
        if hello is None:
            return
        worker = Worker(app, hello, SlotReader(int(request_file)), SlotWriter(int(reply_file)))
        replies: list[Frame] = []
        while (frame := channel.receive()) is not None:
            started = time.perf_counter()
            replies.append(worker.answer(frame))
            would_wait = len(replies) * (time.perf_counter() - started)  # the first one, if the next takes as long
            if would_wait > _HOLD_SECONDS or not channel.ready:
                channel.send(*replies)
                replies.clear()


if __name__ == "__main__":
    main(*sys.argv[1:])
