"""Run a scenario on this machine and sum it up."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from flwr.app import Message

from conclave.privacy.ledger.reading.history import LedgerFile
from conclave.privacy.ledger.reading.spending import budget_of
from conclave.server.metrics import dropped_by, unchanged
from conclave.server.node_level.account import NodeAccount
from conclave.server.rounds.checkpoint import read_checkpoint
from conclave.server.run_directory import RunDirectory
from conclave.server.scenario import Scenario
from conclave.server.trainable import check_trainable
from conclave.simulations import client_app, server_app
from conclave.simulations.baseline_note import BaselineNote, read_note
from conclave.simulations.engines.inline import run_inline
from conclave.simulations.engines.ray import run_on_ray
from conclave.simulations.engines.worker_pool import WorkerPool
from conclave.simulations.simulated_nodes import deal, open_simulated


@dataclass(frozen=True)
class Summary:
    """The results of a simulation.

    accuracy, bits_per_byte: of the final model on public test records; None if the task has none.
    order0_bits_per_byte: the entropy of the same bytes without context.
    epsilon: the largest over nodes, the enforced RDP value from the ledgers; ``inf`` without privacy.
    node_epsilon: of the server's account at ``node_delta``, where the node is the unit too; the two stand side by side.
    bytes_per_node: mean bytes a node exchanged in a round, both ways, on the wire; 0 in a baseline without federation.
    dropped_by: reason → replies over the run that did not count for it. unchanged: rounds that had too few replies.
    held_out: the result of the last private evaluation; held_out_epsilon: what all of them spent, the largest over
        nodes; None if there is none.
    baseline: which one the run is, if it is one.
    """

    accuracy: float | None
    bits_per_byte: float | None
    order0_bits_per_byte: float | None
    epsilon: float
    delta: float
    rounds: int
    bytes_per_node: int
    bytes_full_model: int
    dropped_by: dict[str, int]
    unchanged: int
    run: Path
    node_epsilon: float | None = None
    node_delta: float | None = None
    held_out: dict[str, Any] | None = None
    held_out_epsilon: float | None = None
    baseline: BaselineNote | None = None


def run_number(scenario: Scenario) -> int:
    """Return the run id of a simulation, a function of the scenario: the same run has the same charges."""
    return int.from_bytes(hashlib.sha256(scenario.toml_for_hash().encode()).digest()[:7], "big")


def simulate(
    scenario: Scenario,
    run: RunDirectory,
    on_round: Callable[[int], None] = lambda _: None,
    *,
    engine: Literal["inline", "ray"] = "inline",
    workers: int = 1,
    threads: int = 1,
) -> Summary:
    """Run the rounds of a scenario that are left in its run directory.

    Args:
        on_round: called with a round's number whenever one of its replies has arrived.
        engine: ``inline`` calls the nodes directly; ``ray`` is Flower's own simulation runtime.
        workers: nodes run in this process (1), or in this many worker processes with one thread each. The
            result does not depend on it.
        threads: torch's threads in this process. More than one helps large models on an idle machine; on a busy
            one, small products can then take a hundred times as long. The result may differ in its last bits.

    Raises:
        BadInputError: the scenario cannot be carried out, or its model cannot be trained as it asks.
        RunFailedError: too few nodes take part, every node refused a round, or no round changed anything.
    """

    def on_reply(reply: Message) -> None:
        if reply.metadata.group_id:
            on_round(int(reply.metadata.group_id))

    if scenario.node_privacy is not None:
        NodeAccount.begin_simulated(run.node_account, scenario.node_privacy, scenario.seed)
    deal(scenario.to_toml())  # a partition that cannot be made is the caller's mistake, not each node's
    check_trainable(scenario)  # nor is a model that cannot be trained, whatever the engine makes of the server's errors
    nodes, run_id = scenario.nodes, run_number(scenario)
    if run.checkpoint.exists():  # before nodes with other keys meet the ledgers of a scenario that was edited
        read_checkpoint(run.checkpoint).check_belongs(run.checkpoint, scenario.plan().hash, str(run_id))
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    run_config = {"scenario": scenario.to_toml(), "run-dir": str(run.path)}
    try:
        with contextlib.ExitStack() as stack:
            if engine == "ray":
                run_on_ray(
                    server_app.app,
                    client_app.app,
                    nodes=nodes,
                    run_id=run_id,
                    run_config=run_config | {"run-dir": str(run.path.resolve())},
                    workers=workers,
                )
                return summarize(run)
            pool = None
            if workers > 1:
                pool = WorkerPool(
                    workers, "conclave.simulations.client_app:app", run_id=run_id, nodes=nodes, run_config=run_config
                )
                stack.enter_context(pool)
            run_inline(
                server_app.app,
                client_app.app,
                nodes=nodes,
                run_id=run_id,
                run_config=run_config,
                on_reply=on_reply,
                pool=pool,
            )
    finally:
        torch.set_num_threads(threads_before)
        open_simulated.cache_clear()  # closes this run's ledgers with the nodes that hold them
    return summarize(run)


def summarize(run: RunDirectory) -> Summary:
    """Sum up a finished run from its directory."""
    scenario, metrics, note = run.scenario, run.whole_metrics(), read_note(run.path)
    exchanged = [line["bytes_down_per_node"] + line["bytes_up_per_node"] for line in metrics]
    return Summary(
        accuracy=metrics[-1].get("accuracy"),
        bits_per_byte=metrics[-1].get("bits_per_byte"),
        order0_bits_per_byte=metrics[-1].get("order0_bits_per_byte"),
        epsilon=_largest_epsilon(run.ledgers),
        delta=scenario.privacy.delta,
        rounds=metrics[-1]["round"],
        bytes_per_node=round(sum(exchanged) / len(exchanged)) if note is None or note.federated else 0,
        bytes_full_model=metrics[-1]["bytes_full_model"],
        dropped_by=dropped_by(metrics),
        unchanged=unchanged(metrics),
        run=run.path,
        node_epsilon=None if scenario.node_privacy is None else budget_of(LedgerFile(run.node_account)).spent,
        node_delta=None if scenario.node_privacy is None else scenario.node_privacy.delta,
        held_out=metrics[-1].get("private_evaluation"),
        held_out_epsilon=None if scenario.evaluation is None else _largest_epsilon(run.held_out_ledgers),
        baseline=note,
    )


def _largest_epsilon(ledgers: Sequence[Path]) -> float:
    return max((budget_of(LedgerFile(path)).spent for path in ledgers), default=0.0)
