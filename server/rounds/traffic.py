"""Bytes on the wire: what Flower sends for a message."""

from __future__ import annotations

from flwr.app import Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from conclave.protocol.codec import lengths

_known: dict[tuple[int, ...], int] = {}


def wire_bytes(carrier: Message | RecordDict) -> int:
    """Return the bytes of the objects Flower transfers for a message or its content, HTTP framing excluded.

    Equal objects are counted once, since Flower sends them once.
    """
    return sum(len(part.deflate()) for part in get_all_nested_objects(carrier).values())


def exchange_bytes(content: RecordDict) -> int:
    """Return :func:`wire_bytes` of a content built by :func:`conclave.protocol.codec.encode`.

    Deflating copies and hashes every byte, several times the cost of encoding. The result depends only on the
    lengths of what the content holds, so each combination is measured once.
    """
    key = lengths(content)
    if key not in _known:
        _known[key] = wire_bytes(content)
    return _known[key]
