"""The node that this process stands for, where it runs beside private data."""

from __future__ import annotations

from clients.node import Node

_node: list[Node] = []


def deploy(node: Node) -> None:
    """Answer as this node from now on, whatever messages say.

    Raises:
        RuntimeError: the process stands for a node already.
    """
    if _node:
        raise RuntimeError("this process stands for another node")
    _node.append(node)


def deployed() -> Node | None:
    """Return the node that was deployed here; None in a simulation."""
    return _node[0] if _node else None


def withdraw() -> None:
    """Stand for no node any more."""
    _node.clear()
