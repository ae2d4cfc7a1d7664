"""The Flower ServerApp: describe nodes, run the rounds, evaluate on public data, write the run directory."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from clients.protocol import (
    QUERY_ADMIT,
    QUERY_CLOSE,
    QUERY_DESCRIBE,
    Admission,
    AdmitRequest,
    Closed,
    CloseRequest,
    DescribeRequest,
    Description,
    Plan,
    ProtocolError,
    decode,
    encode,
)
from data.shipped_scenarios import scenario_text
from data.simulated_run import simulated_run_dir
from data.sources import load
from model import BadInputError, build, parameters
from model.config import Frozen
from server.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from server.coverage import Coverage, shortage
from server.evaluation import Evaluation, evaluate
from server.node_account import NodeAccount, NodeLevel
from server.receipts import ReceiptBook
from server.run_directory import RunDirectory
from server.scenario import Scenario, parse_scenario
from server.strategy import ExpertStrategy
from server.wishes import Wishes

log = logging.getLogger("conclave.server")

app = ServerApp()

_NODES_APPEAR_WITHIN_S = 5.0


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the scenario in the run config: TOML, a shipped name, or nothing for the default."""
    scenario = parse_scenario(scenario_text(str(context.run_config["scenario"])), where="run config")
    path = simulated_run_dir(str(context.run_config["run-dir"]), context.run_id)
    started_elsewhere = (path / "scenario.toml").is_file()
    run = RunDirectory(path) if started_elsewhere else RunDirectory.create(scenario, path)
    run_scenario(grid, scenario, run, str(context.run_id))


def run_scenario(grid: Grid, scenario: Scenario, run: RunDirectory, run_id: str) -> None:
    """Run the rounds that are left and leave metrics, checkpoint and model in the run directory.

    A directory with a checkpoint continues after its round, with the state it had; so a killed run that is
    started again does what it would have done. Rounds that nodes were already charged for cost nothing again.

    Raises:
        BadInputError: no usable node answered, the scenario cannot be carried out, or the checkpoint is damaged
            or belongs to another plan.
    """
    plan = scenario.plan()
    test = load(scenario.data).test
    network = build(scenario.model, scenario.seed)
    nodes = describe_nodes(grid, scenario)
    strategy = ExpertStrategy(
        plan=plan,
        config=scenario.federation,
        seed=scenario.seed,
        run_id=run_id,
        nodes=nodes,
        tensors=parameters.split(network.state_dict(), network.held),
        scenario=scenario.name,
        receipts=ReceiptBook(run.receipts),
        node_level=_node_level(scenario, plan, run, run_id),
        balancing=scenario.balancing,
        wishes=None if plan.affinity is None else Wishes(plan, run.path / "wishes.json"),
    )
    strategy.summary()
    full_bytes = strategy.full_model_bytes()
    done = _restore(strategy, run, plan.hash)
    if done < scenario.federation.rounds:
        _check_coverage(scenario, strategy)  # before any budget is set aside
        strategy.keep_only(admitted(grid, scenario, plan, run_id, nodes))
        _check_coverage(scenario, strategy)  # what is set aside stays: with more nodes the run can still go on
    coverage = Coverage(scenario.model.layers, scenario.model.experts.routed, scenario.federation.min_holders)
    coverage.restore(run.metrics() if done else ())
    for round_number in range(done + 1, scenario.federation.rounds + 1):
        started = time.perf_counter()
        strategy.ask_wishes(round_number, grid, scenario.federation.reply_timeout_s)
        requests = strategy.configure_train(round_number, ArrayRecord(), ConfigRecord(), grid)
        replies = grid.send_and_receive(requests, timeout=scenario.federation.reply_timeout_s)
        strategy.aggregate_train(round_number, replies)
        wire = strategy.optimizer.snapshot()
        evaluation = evaluate(scenario.model, wire, test)
        seconds = time.perf_counter() - started
        # Metrics first: a round that has a checkpoint has its metrics, and resuming drops those without one.
        coverage.add(strategy.tally.trained)
        line = _metrics(round_number, strategy, evaluation, full_bytes, seconds)
        run.append_metrics({**line, **coverage.metrics()})
        checkpoint = Checkpoint(round_number, run_id, plan.hash, wire, strategy.optimizer.momentum())
        write_checkpoint(run.checkpoint, checkpoint)
        log.info("round %d: loss %.4f", round_number, evaluation.loss)
    run.save_model(scenario.model, strategy.optimizer.snapshot())
    close_run(grid, scenario, nodes, run_id)
    if strategy.node_level is not None:
        strategy.node_level.close()


def _node_level(scenario: Scenario, plan: Plan, run: RunDirectory, run_id: str) -> NodeLevel | None:
    """Open the server's account where the node is the unit."""
    mechanism = scenario.node_mechanism()
    if scenario.node_privacy is None or mechanism is None:
        return None
    return NodeLevel(
        NodeAccount.open(run.node_account, scenario.node_privacy, scenario.seed),
        config=scenario.node_privacy,
        mechanism=mechanism,
        plan=plan,
        run_id=run_id,
        experts_per_node=scenario.federation.experts_per_node,
        seed=scenario.seed,
    )


def _check_coverage(scenario: Scenario, strategy: ExpertStrategy) -> None:
    """Refuse to start where the nodes that are there cannot give every expert its holders.

    Not where the node is the unit: there, whether a run starts may not depend on who is there.
    """
    if scenario.node_privacy is not None:
        return
    capacities = [description.expert_capacity for _, description in strategy.nodes.values()]
    short = shortage(scenario.federation, scenario.model.experts.routed, capacities)
    if short is not None:
        raise BadInputError(short)


def _restore(strategy: ExpertStrategy, run: RunDirectory, plan_hash: str) -> int:
    """Put the checkpointed state back, if there is one; return the last round that is done."""
    if not run.checkpoint.exists():
        run.keep_metrics(0)
        return 0
    checkpoint = read_checkpoint(run.checkpoint)
    if checkpoint.plan_hash != plan_hash or checkpoint.run_id != strategy.run_id:
        raise BadInputError(f"{run.checkpoint}: belongs to another plan, must be of the scenario beside it")
    strategy.optimizer.restore(checkpoint.tensors, checkpoint.momentum)
    run.keep_metrics(checkpoint.round)
    return checkpoint.round


def describe_nodes(grid: Grid, scenario: Scenario) -> dict[int, Description]:
    """Ask every node what is public about it; return those that can take part, by Flower node id.

    Raises:
        BadInputError: none can.
    """
    request = DescribeRequest(model=scenario.model)
    requests = [
        Message(content=encode(request), dst_node_id=node, message_type=QUERY_DESCRIBE)
        for node in _connected(grid, scenario.nodes)
    ]
    replies = grid.send_and_receive(requests, timeout=scenario.federation.reply_timeout_s)
    refused: Counter[str] = Counter()
    described = dict(_descriptions(replies, scenario.model.experts.top_k, refused))
    if not described:
        why = ", ".join(f"{count} × {code}" for code, count in refused.items()) or "none answered"
        hint = ""
        if refused["schema-mismatch"]:
            hint = f"; a simulation of this scenario needs {scenario.nodes} nodes"
        raise BadInputError(f"no node can take part ({why}), must be at least one{hint}")
    return described


def admitted(grid: Grid, scenario: Scenario, plan: Plan, run_id: str, nodes: Mapping[int, Description]) -> set[int]:
    """Ask every node to admit the plan before round one; return those that set their budget aside for it.

    Raises:
        BadInputError: none did.
    """
    request = AdmitRequest(run_id=run_id, scenario=scenario.name, plan=plan)
    refused: Counter[str] = Counter()
    agreed = set()
    for node, reply in _ask_all(grid, scenario, nodes, QUERY_ADMIT, request):
        try:
            if decode(reply, Admission).plan_hash != plan.hash:
                raise ProtocolError("bad-request", "another plan than was asked for")
        except ProtocolError as error:
            log.warning("node %s does not admit the plan: %s", nodes[node].fingerprint, error.code)
            refused[error.code] += 1
        else:
            agreed.add(node)
    if not agreed:
        why = ", ".join(f"{count} × {code}" for code, count in refused.items()) or "none answered"
        raise BadInputError(f"no node admits the plan ({why}), must be at least one; its owner's log says why")
    return agreed


def close_run(grid: Grid, scenario: Scenario, nodes: Mapping[int, Description], run_id: str) -> None:
    """Tell the nodes that the run is over, so that they give back what it did not use."""
    for node, reply in _ask_all(grid, scenario, nodes, QUERY_CLOSE, CloseRequest(run_id=run_id)):
        try:
            decode(reply, Closed)
        except ProtocolError as error:
            log.warning("node %s did not close the run: %s", nodes[node].fingerprint, error.code)


def _ask_all(
    grid: Grid, scenario: Scenario, nodes: Mapping[int, Description], message_type: str, document: Frozen
) -> Iterator[tuple[int, RecordDict]]:
    """Send every node the same document; yield the replies in the order of nodes. Who fails to answer is logged."""
    requests = [Message(content=encode(document), dst_node_id=node, message_type=message_type) for node in nodes]
    replies = grid.send_and_receive(requests, timeout=scenario.federation.reply_timeout_s)
    for reply in sorted(replies, key=lambda message: message.metadata.src_node_id):
        node = reply.metadata.src_node_id
        if node in nodes and reply.has_content():
            yield node, reply.content
        else:
            log.warning("node %d failed to answer", node)


def _connected(grid: Grid, expected: int) -> list[int]:
    """Return the connected nodes, after giving ``expected`` of them a moment to appear.

    Flower's simulation runtime starts the ServerApp before its nodes are registered.
    """
    deadline = time.monotonic() + _NODES_APPEAR_WITHIN_S
    while len(nodes := list(grid.get_node_ids())) < expected and time.monotonic() < deadline:
        time.sleep(0.1)
    return nodes


def _descriptions(replies: Iterable[Message], top_k: int, refused: Counter[str]) -> Iterable[tuple[int, Description]]:
    seen = set()
    for reply in sorted(replies, key=lambda message: message.metadata.src_node_id):
        node = reply.metadata.src_node_id
        try:
            if not reply.has_content():
                raise ProtocolError("internal-error")
            description = decode(reply.content, Description)
        except ProtocolError as error:
            log.warning("node %d cannot take part: %s", node, error.code)
            refused[error.code] += 1
            continue
        if description.fingerprint in seen:
            log.warning("node %d uses the key of another node; left out", node)
        elif description.expert_capacity < top_k:
            log.warning("node %s can hold fewer experts than a token needs; left out", description.fingerprint)
        else:
            seen.add(description.fingerprint)
            yield node, description


def _metrics(
    round_number: int, strategy: ExpertStrategy, evaluation: Evaluation, full_bytes: int, seconds: float
) -> dict[str, Any]:
    tally = strategy.tally
    return {
        "round": round_number,
        **{name: value for name, value in asdict(evaluation).items() if value is not None},
        "asked": tally.asked,
        "accepted": tally.accepted,
        "refused": dict(tally.refused),
        "dropped": tally.dropped,
        "missing": tally.missing,
        "tensors_unchanged": tally.held_back,
        "bytes_down_per_node": round(tally.bytes_down / max(1, tally.asked)),
        "bytes_up_per_node": round(tally.bytes_up / max(1, tally.accepted)),
        "bytes_full_model": full_bytes,
        "seconds": round(seconds, 4),
        **({} if tally.loads is None else {"private_load": tally.loads}),
    }
