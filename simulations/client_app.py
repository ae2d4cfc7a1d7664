"""The Flower ClientApp of simulated nodes: the engine decides which one it answers as, never a message."""

from __future__ import annotations

from flwr.app import Context

from conclave.clients.app import make_client_app
from conclave.clients.node import Node
from conclave.protocol.messages import ProtocolError
from conclave.simulations.run_config import scenario_text, simulated_run_dir
from conclave.simulations.simulated_nodes import open_simulated


def open_node(context: Context) -> Node:
    """Find the simulated node that the engine runs.

    ``partition-id`` is set by a simulation engine on its own side; a message cannot set it.

    Raises:
        ProtocolError: ``not-enrolled``, the node has not been set up.
    """
    number, of = (context.node_config.get(key) for key in ("partition-id", "num-partitions"))
    if not isinstance(number, int) or not isinstance(of, int):
        raise ProtocolError("not-enrolled", "this node has no data configured")
    return open_simulated(
        scenario_text(str(context.run_config["scenario"])),
        str(simulated_run_dir(str(context.run_config["run-dir"]), context.run_id)),
        number,
        of,
    )


app = make_client_app(open_node)
