"""Flower messages between this process and its workers, over a local socket.

A frame is a JSON header, the record without its tensors in Flower's own encoding, and the packed tensors as they
are. Tensors that a worker was sent before are named, not sent again: a broadcast travels once to each worker.
"""

from __future__ import annotations

import json
import socket
import struct
from dataclasses import dataclass

from flwr.app import ArrayRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto

_PREFIX = struct.Struct("!I")


@dataclass(frozen=True)
class Frame:
    """One message.

    header: what is not content: node, message type, group. blob: packed tensors, or None. blob_id: their name, 0
    for tensors used once.
    """

    header: dict[str, int | str]
    record: RecordDict
    blob: bytes | None
    blob_id: int


def send_frame(connection: socket.socket, frame: Frame) -> None:
    """Send a frame whose ``record`` holds no tensors. Raises OSError when the other side is gone."""
    record = recorddict_to_proto(frame.record).SerializeToString()
    size = -1 if frame.blob is None else len(frame.blob)
    header = json.dumps({**frame.header, "record": len(record), "blob": size, "blob_id": frame.blob_id}).encode()
    connection.sendall(_PREFIX.pack(len(header)) + header + record)
    if frame.blob is not None:
        connection.sendall(frame.blob)


def receive_frame(connection: socket.socket) -> Frame | None:
    """Receive a frame; None when the other side has closed."""
    prefix = _receive(connection, _PREFIX.size)
    if prefix is None:
        return None
    header = json.loads(_expect(connection, _PREFIX.unpack(prefix)[0]))
    record = RecordDictProto.FromString(bytes(_expect(connection, header.pop("record"))))
    size, blob_id = header.pop("blob"), header.pop("blob_id")
    blob = None if size < 0 else bytes(_expect(connection, size))
    return Frame(header, recorddict_from_proto(record), blob, blob_id)


def without_tensors(content: RecordDict) -> RecordDict:
    """Return the content's other records; tensors travel beside them."""
    return RecordDict({key: value for key, value in content.items() if not isinstance(value, ArrayRecord)})


def _expect(connection: socket.socket, size: int) -> bytearray:
    data = _receive(connection, size)
    if data is None:
        raise ConnectionError("the other side closed in the middle of a message")
    return data


def _receive(connection: socket.socket, size: int) -> bytearray | None:
    data = bytearray(size)
    view, have = memoryview(data), 0
    while have < size:
        count = connection.recv_into(view[have:])
        if count == 0:
            if have == 0:
                return None
            raise ConnectionError("the other side closed in the middle of a message")
        have += count
    return data
