"""Bytes on the wire: what Flower sends for a message."""

from __future__ import annotations

from flwr.app import Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects


def wire_bytes(carrier: Message | RecordDict) -> int:
    """Return the bytes of the objects Flower transfers for a message or its content, HTTP framing excluded.

    Objects that are equal are sent once, as Flower does.
    """
    return sum(len(part.deflate()) for part in get_all_nested_objects(carrier).values())
