"""Messages between this process and its workers, over a local socket.

A frame is a small JSON header and the text of a message's document. Tensors never travel in it: the header says
where they lie in shared memory. Flower's own encoding would cost more than all the rest of a short message.
"""

from __future__ import annotations

import json
import select
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from conclave.protocol.codec import encode_tensors

_PREFIX = struct.Struct("!Ii")  # lengths of header and document; -1: there is no document
_CHUNK = 1 << 14  # more than most frames: one call receives one, or several that are waiting


@dataclass(frozen=True)
class Frame:
    """One message: what is not content (node, message type, place of the tensors), and the document or None."""

    header: dict[str, Any]
    document: str | None = None


class Channel:
    """Frames over one connected socket."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._received = b""

    @property
    def ready(self) -> bool:
        """Whether a frame, or its beginning, has arrived."""
        return bool(self._received) or bool(select.select([self.connection], [], [], 0)[0])

    def send(self, *frames: Frame) -> None:
        """Send frames in one call. Raises OSError when the other side is gone."""
        parts = []
        for frame in frames:
            header = json.dumps(frame.header).encode()
            document = None if frame.document is None else frame.document.encode()
            size = -1 if document is None else len(document)
            parts += [_PREFIX.pack(len(header), size), header, document or b""]
        self.connection.sendall(b"".join(parts))

    def receive_all(self) -> list[Frame]:
        """Wait for a frame and return it with others that have arrived; empty when the other side has closed.

        Raises:
            ConnectionError: it closed in the middle of a frame.
        """
        frames: list[Frame] = []
        while (self._received or not frames) and (frame := self.receive()) is not None:
            frames.append(frame)
        return frames

    def receive(self) -> Frame | None:
        """Receive one frame; None when the other side has closed.

        Raises:
            ConnectionError: it closed in the middle of a frame.
        """
        if not self._received:
            self._received = self.connection.recv(_CHUNK)
            if not self._received:
                return None
        self._expect(_PREFIX.size)
        header_size, document_size = _PREFIX.unpack_from(self._received)
        middle = _PREFIX.size + header_size
        end = middle + max(document_size, 0)
        self._expect(end)
        data, self._received = self._received, self._received[end:]
        document = None if document_size < 0 else data[middle:end].decode()
        return Frame(json.loads(data[_PREFIX.size : middle]), document)

    def _expect(self, size: int) -> None:
        while len(self._received) < size:
            more = self.connection.recv(_CHUNK)
            if not more:
                raise ConnectionError("the other side closed in the middle of a message")
            self._received += more


def document_of(content: RecordDict) -> str | None:
    """Return the text of a content's document, None if it has none.

    Raises:
        ValueError: the content does not have the form that :func:`conclave.protocol.codec.encode` makes; what a frame
            cannot carry is refused, not lost.
    """
    record = content.get("document")
    if isinstance(record, ConfigRecord) and len(record) == 1 and content.keys() <= {"document", "tensors"}:
        text = record.get("json")
        if isinstance(text, str):
            return text
    elif record is None and content.keys() <= {"tensors"}:
        return None
    raise ValueError(f"worker processes carry one document and tensors, not the records {sorted(content)}")


def content_of(document: str | None, tensors: ArrayRecord | bytes | Mapping[str, Tensor] | None) -> RecordDict:
    """Build a message's content from what a frame and shared memory brought."""
    content = RecordDict()
    if document is not None:
        content["document"] = ConfigRecord({"json": document})
    if tensors is not None:
        content["tensors"] = tensors if isinstance(tensors, ArrayRecord) else encode_tensors(tensors)
    return content
