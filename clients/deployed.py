"""The node that this process stands for, where it runs beside private data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from clients.node import Node

_nodes: list[Node] = []


@contextmanager
def standing_for(node: Node) -> Iterator[None]:
    """Answer as this node within, whatever messages say.

    Raises:
        RuntimeError: the process stands for a node already.
    """
    if _nodes:
        raise RuntimeError("this process stands for another node")
    _nodes.append(node)
    try:
        yield
    finally:
        _nodes.clear()


def deployed() -> Node | None:
    """Return the node that is deployed here; None in a simulation."""
    return _nodes[0] if _nodes else None
