"""Run a scenario on this machine and sum it up."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import Message

import clients.app
import server.app
from clients.simulated import deal, open_simulated
from privacy.ledger import Ledger
from server.run_directory import RunDirectory
from server.scenario import Scenario
from simulations.inline_engine import run_inline


@dataclass(frozen=True)
class Summary:
    """What a simulation came to.

    epsilon: the largest over nodes, the enforced RDP value from the ledgers; ``inf`` without privacy.
    bytes_per_node: mean bytes a node exchanged in a round, both ways, on the wire.
    """

    accuracy: float
    epsilon: float
    delta: float
    rounds: int
    bytes_per_node: int
    bytes_full_model: int
    run: Path


def run_number(scenario: Scenario) -> int:
    """Return the run id of a simulation, a function of the scenario: the same run has the same charges."""
    return int.from_bytes(hashlib.sha256(scenario.to_toml().encode()).digest()[:7], "big")


def simulate(scenario: Scenario, run: RunDirectory, on_round: Callable[[int], None] = lambda _: None) -> Summary:
    """Run the rounds of a scenario that are left in its run directory, in this process.

    Args:
        on_round: called with a round's number whenever one of its replies has arrived.

    Raises:
        BadInputError: the scenario cannot be carried out.
    """

    def on_reply(reply: Message) -> None:
        if reply.metadata.group_id:
            on_round(int(reply.metadata.group_id))

    deal(scenario.to_toml())  # a partition that cannot be made is the caller's mistake, not each node's
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small products gain nothing from two threads, and lose 100-fold on a busy machine
    try:
        run_inline(
            server.app.app,
            clients.app.app,
            nodes=scenario.partition.nodes,
            run_id=run_number(scenario),
            run_config={"scenario": scenario.to_toml(), "run-dir": str(run.path)},
            on_reply=on_reply,
        )
    finally:
        torch.set_num_threads(threads)
        open_simulated.cache_clear()  # closes this run's ledgers with the nodes that hold them
    return summarize(run)


def summarize(run: RunDirectory) -> Summary:
    """Sum up a finished run from its directory."""
    scenario, metrics = run.scenario, run.metrics()
    exchanged = [line["bytes_down_per_node"] + line["bytes_up_per_node"] for line in metrics]
    return Summary(
        accuracy=metrics[-1]["accuracy"],
        epsilon=max((Ledger(path).epsilon_spent for path in run.ledgers), default=0.0),
        delta=scenario.privacy.delta,
        rounds=len(metrics),
        bytes_per_node=round(sum(exchanged) / len(exchanged)),
        bytes_full_model=metrics[-1]["bytes_full_model"],
        run=run.path,
    )
