"""A worker process of the inline engine: answers messages for any node, with one thread.

Run as ``python -m simulations.worker SOCKET FILE SLOTS APP``: a connected socket and a shared file it inherits,
how many replies may be unread at a time, and the ClientApp to import.
"""

from __future__ import annotations

import json
import pkgutil
import socket
import sys
from collections import OrderedDict

import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.app.metadata import Metadata
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID
from safetensors.torch import load

from clients.protocol import array_of
from clients.tensor_array import TensorArray
from simulations.frames import Frame, receive_frame, send_frame, without_tensors
from simulations.shared_slots import SlotWriter

_KEPT_BROADCASTS = 4


class Worker:
    """Keeps one context per node and the last broadcasts, decoded."""

    def __init__(self, app: ClientApp, hello: Frame, replies: SlotWriter) -> None:
        self._app = app
        self._replies = replies
        self._run_id = int(hello.header["run_id"])
        self._nodes = int(hello.header["nodes"])
        self._run_config = {key: str(value) for key, value in hello.record.config_records["run_config"].items()}
        self._contexts: dict[int, Context] = {}
        self._broadcasts: OrderedDict[int, TensorArray] = OrderedDict()

    def answer(self, frame: Frame) -> Frame:
        """Run the ClientApp on one message and return its reply."""
        number = int(frame.header["number"])
        content = RecordDict(dict(frame.record.items()))
        tensors = self._tensors(frame)
        if tensors is not None:
            record = ArrayRecord()
            record["body"] = tensors
            content["tensors"] = record
        reply = self._app(self._message(frame, number, content), self._context(number))
        header: dict[str, int | str] = {"sent": frame.header["sent"]}
        if "tensors" in reply.content:
            array = array_of(reply.content)
            if isinstance(array, TensorArray) and all(t.dtype == torch.float32 for t in array.tensors.values()):
                header["at"], header["size"] = self._replies.write_tensors(array.tensors)
                header["shapes"] = json.dumps({name: list(tensor.shape) for name, tensor in array.tensors.items()})
            else:
                header["at"], header["size"] = self._replies.write(array.data), len(array.data)
        return Frame(header, without_tensors(reply.content), None, 0)

    def _tensors(self, frame: Frame) -> TensorArray | None:
        if frame.blob is None:
            return self._broadcasts.get(frame.blob_id)
        tensors = TensorArray(load(frame.blob), packed=frame.blob)
        if frame.blob_id:
            self._broadcasts[frame.blob_id] = tensors
            if len(self._broadcasts) > _KEPT_BROADCASTS:
                self._broadcasts.popitem(last=False)
        return tensors

    def _message(self, frame: Frame, number: int, content: RecordDict) -> Message:
        metadata = Metadata(
            run_id=self._run_id,
            message_id=f"inline-{frame.header['sent']}",
            src_node_id=SUPERLINK_NODE_ID,
            dst_node_id=SUPERLINK_NODE_ID + 1 + number,
            reply_to_message_id="",
            group_id=str(frame.header["group"]),
            created_at=float(frame.header["created_at"]),
            ttl=float(frame.header["ttl"]),
            message_type=str(frame.header["type"]),
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


def main(descriptor: str, shared_file: str, slots: str, app_path: str) -> None:
    """Answer messages until the other side closes."""
    torch.set_num_threads(1)
    app = pkgutil.resolve_name(app_path)
    with socket.socket(fileno=int(descriptor)) as connection:
        hello = receive_frame(connection)
        if hello is None:
            return
        worker = Worker(app, hello, SlotWriter(int(shared_file), int(slots)))
        while (frame := receive_frame(connection)) is not None:
            send_frame(connection, worker.answer(frame))


if __name__ == "__main__":
    main(*sys.argv[1:])
