"""A federation that several soak tests share: each leaves it whole, and the next one's first round shows it."""

from __future__ import annotations

from contextlib import closing

import pytest


@pytest.fixture(scope="session")
def wired(tmp_path_factory):
    """A server and three nodes, of which the third dials a wire that can be cut; and the wire."""
    from federation import NODES
    from soaking import Wire, add_node, serving

    with serving(tmp_path_factory.mktemp("soak")) as made, closing(Wire(made.port)) as wire:
        for name in NODES:
            add_node(made, name, port=wire.port if name == "third" else None)
        for name in NODES:
            made.connect(name)
        made.wait_for_nodes(NODES)
        yield made, wire


@pytest.fixture
def federation(wired):
    return wired[0]


@pytest.fixture
def wire(wired):
    return wired[1]
