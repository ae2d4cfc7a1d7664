"""A run from its first question to its model: describe nodes, admit them, go round by round, finish."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid
from torch import Tensor

from conclave.base.errors import RunFailedError
from conclave.data.sources import public_test
from conclave.model import parameters
from conclave.model.building import build
from conclave.protocol.plan import Plan
from conclave.server.aggregate.averaging import ModelAverage
from conclave.server.assign.choices import Choices
from conclave.server.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from conclave.server.coverage import Coverage, shortage
from conclave.server.evaluate.public import Evaluation, evaluate
from conclave.server.metrics import dropped_by, unchanged
from conclave.server.node_level.account import NodeAccount
from conclave.server.node_level.rounds import NodeLevelRounds
from conclave.server.replies.receipts import ReceiptBook
from conclave.server.roster import Roster, counted
from conclave.server.run_directory import RunDirectory
from conclave.server.scenario import Scenario
from conclave.server.strategy import ExpertStrategy
from conclave.server.trainable import check_trainable

log = logging.getLogger("conclave.server")


def run_scenario(
    grid: Grid,
    scenario: Scenario,
    run: RunDirectory,
    run_id: str,
    on_round: Callable[[Mapping[str, Any]], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Run the rounds that are left and leave metrics, checkpoint and model in the run directory.

    A directory with a checkpoint continues after its round, with the state it had; so a killed run that is
    started again does what it would have done. Rounds that nodes were already charged for cost nothing again.

    Args:
        run_id: names the run in every charge.
        on_round: told each round's metrics.
        say: told in words how many nodes refused, and why, what each round came to, what was lost, or that nothing is
            left to do.

    Raises:
        BadInputError: the scenario cannot be carried out, the model cannot be trained as it asks, or the checkpoint is
            damaged or belongs to another plan.
        RunFailedError: too few nodes take part, every node that was asked refused a round, or no round changed
            anything.
    """
    run.note_code()
    plan = scenario.plan()
    check_trainable(scenario)
    test = public_test(scenario.data)
    network = build(scenario.model, scenario.seed)
    roster = Roster(grid, scenario, plan, run_id)
    strategy = ExpertStrategy(
        plan=plan,
        config=scenario.federation,
        seed=scenario.seed,
        run_id=run_id,
        nodes=roster.describe(),
        tensors=_initial(plan, parameters.split(network.state_dict(), network.held)),
        scenario=scenario.name,
        receipts=ReceiptBook(run.receipts),
        node_level=_node_level(scenario, plan, run, run_id),
        balancing=scenario.balancing,
        choices=None if plan.affinity is None else Choices(plan, run.path / "choices.json"),
    )
    strategy.summary()
    full_bytes = strategy.full_model_bytes()
    average = ModelAverage(scenario.federation.average, scenario.federation.rounds)
    done = _restore(strategy, average, run, plan.hash)
    if done == scenario.federation.rounds:
        say(f"all {done} rounds were done before; nothing is left to do")
    else:
        _check_coverage(scenario, strategy, roster.refused)  # before any budget is set aside
        strategy.meet(roster.admit())
        if roster.refused:
            say(f"nodes that do not take part: {counted(roster.refused)}")
        # What is set aside stays: with more nodes the run can still go on.
        _check_coverage(scenario, strategy, roster.refused)
    coverage = Coverage(scenario.model.layers, scenario.model.experts.routed, scenario.federation.min_holders)
    coverage.restore(_known_rounds(run, done, say))
    for round_number in range(done + 1, scenario.federation.rounds + 1):
        started = time.perf_counter()
        if round_number > done + 1 and roster.refresh():
            strategy.meet(roster.members())
        strategy.ask_choices(round_number, grid, scenario.federation.reply_timeout_s)
        requests = strategy.configure_train(round_number, ArrayRecord(), ConfigRecord(), grid)
        replies = grid.send_and_receive(requests, timeout=scenario.federation.reply_timeout_s)
        strategy.aggregate_train(round_number, replies)
        wire = strategy.optimizer.snapshot()
        if strategy.tally.changed:
            average.add(round_number, wire)
        published = average.of(wire)
        measuring = strategy.evaluation_requests(round_number, published)
        if measuring:
            answers = grid.send_and_receive(measuring, timeout=scenario.federation.reply_timeout_s)
            strategy.aggregate_evaluate(round_number, answers)
        evaluation = None if test is None else evaluate(scenario.model, published, test)
        seconds = time.perf_counter() - started
        # Metrics first: a round that has a checkpoint has its metrics, and resuming drops those without one.
        coverage.add(strategy.tally.trained)
        line = _metrics(round_number, strategy, evaluation, full_bytes, seconds)
        line |= coverage.metrics()
        run.append_metrics(line)
        checkpoint = Checkpoint(
            round=round_number,
            run_id=run_id,
            plan_hash=plan.hash,
            tensors=wire,
            optimizer=strategy.optimizer.state(),
            history={} if strategy.noise_test is None else strategy.noise_test.history,
            average=average.tensors,
            averaged=average.count,
        )
        write_checkpoint(run.checkpoint, checkpoint)
        said = _said(round_number, scenario.federation.rounds, strategy, evaluation, seconds)
        log.info(said)
        on_round(line)
        say(said)
        _check_somebody_took_part(round_number, strategy)
    run.save_model(scenario.model, average.of(strategy.optimizer.snapshot()))
    roster.close()
    if strategy.node_level is not None:
        strategy.node_level.close()
    _check_something_changed(run.whole_metrics())


def _check_somebody_took_part(round_number: int, strategy: ExpertStrategy) -> None:
    """End a run that every node refuses; not where the node is the unit, whose part in a round must not show.

    A node that was charged for this round already takes part in the next one: the run goes on for it.
    """
    tally = strategy.tally
    nobody = tally.asked > 0 and tally.refused.total() == tally.asked
    if strategy.node_level is None and nobody and not tally.refused["already-charged"]:
        raise RunFailedError(
            f"in round {round_number} every node refused ({counted(tally.refused)}); nodes' logs say why, "
            "and with --resume the run goes on after that round"
        )


def _check_something_changed(metrics: Sequence[Mapping[str, Any]]) -> None:
    """End a run that came to nothing; not where its draws asked nobody, which costs nothing and is as planned."""
    if unchanged(metrics) < len(metrics) or not any(line.get("asked", 1) for line in metrics):
        return
    refused, dropped = Counter[str](), Counter(dropped_by(metrics))
    for line in metrics:
        refused.update(line["refused"])
    why = counted(refused + dropped) or "too few nodes answered"
    raise RunFailedError(f"in {len(metrics)} rounds nothing changed the model ({why})")


def _initial(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the global model to begin with. Experts that stay on nodes are silent in it: nobody trains these."""
    return {name: torch.zeros_like(t) if plan.stays(name) else t for name, t in tensors.items()}


def _node_level(scenario: Scenario, plan: Plan, run: RunDirectory, run_id: str) -> NodeLevelRounds | None:
    """Open the server's account where the node is the unit."""
    mechanism = scenario.node_mechanism()
    if scenario.node_privacy is None or mechanism is None:
        return None
    return NodeLevelRounds(
        NodeAccount.open(run.node_account, scenario.node_privacy, scenario.seed),
        config=scenario.node_privacy,
        mechanism=mechanism,
        plan=plan,
        run_id=run_id,
        experts_per_node=scenario.federation.experts_per_node,
        seed=scenario.seed,
    )


def _check_coverage(scenario: Scenario, strategy: ExpertStrategy, refused: Counter[str]) -> None:
    """Refuse to start where the nodes that are there cannot give every expert its holders.

    Not where the node is the unit: there, whether a run starts may not depend on who is there.
    """
    if scenario.node_privacy is not None:
        return
    capacities = [description.expert_capacity for _, description in strategy.nodes.values()]
    short = shortage(scenario.federation, scenario.model.experts.routed, capacities)
    if short is not None:
        absent = f"; nodes that do not take part: {counted(refused)}" if refused else ""
        raise RunFailedError(f"{short}{absent}")


def _restore(strategy: ExpertStrategy, average: ModelAverage, run: RunDirectory, plan_hash: str) -> int:
    """Put the checkpointed state back, if there is one; return the last round that is done."""
    if not run.checkpoint.exists():
        return 0
    checkpoint = read_checkpoint(run.checkpoint)
    checkpoint.check_belongs(run.checkpoint, plan_hash, strategy.run_id)
    strategy.optimizer.restore(checkpoint.tensors, checkpoint.optimizer)
    if strategy.noise_test is not None:
        strategy.noise_test.history = {node: dict(sums) for node, sums in checkpoint.history.items()}
    average.restore(checkpoint.averaged, checkpoint.average, checkpoint.tensors)
    return checkpoint.round


def _known_rounds(run: RunDirectory, done: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Return the metrics of the rounds that are done. What a disk lost of them is no reason not to go on."""
    known = run.keep_metrics(done)
    if len(known) < done:
        said = f"the metrics of {done - len(known)} of {done} rounds are lost; counts over rounds leave these out"
        log.warning("%s: %s", run.path, said)
        say(said)
    return known


def _said(
    round_number: int, rounds: int, strategy: ExpertStrategy, evaluation: Evaluation | None, seconds: float
) -> str:
    tally = strategy.tally
    parts = [] if evaluation is None else [f"loss {evaluation.loss:.4f}"]
    parts.append(f"{tally.accepted} of {tally.asked} replies")
    if tally.evaluation is not None and tally.evaluation.over_units is not None:
        mean = tally.evaluation.over_units
        parts.append(f"{tally.evaluation.metric} on held-out units {mean.value * tally.evaluation.bound:.4f}")
    return f"round {round_number} of {rounds}: {', '.join(parts)}, {seconds:.1f} s"


def _metrics(
    round_number: int, strategy: ExpertStrategy, evaluation: Evaluation | None, full_bytes: int, seconds: float
) -> dict[str, Any]:
    public = {} if evaluation is None else asdict(evaluation)
    tally = strategy.tally
    return {
        "round": round_number,
        **{name: value for name, value in public.items() if value is not None},
        "nodes": len(strategy.nodes),
        "asked": tally.asked,
        "accepted": tally.accepted,
        "refused": dict(tally.refused),
        "dropped": tally.dropped,
        "dropped_by": dict(tally.dropped_by),
        "missing": tally.missing,
        "changed": tally.changed,
        "tensors_unchanged": tally.held_back,
        "bytes_down_per_node": round(tally.bytes_down / max(1, tally.asked)),
        "bytes_up_per_node": round(tally.bytes_up / max(1, tally.accepted)),
        "bytes_full_model": full_bytes,
        "seconds": round(seconds, 4),
        **({} if tally.loads is None else {"private_load": tally.loads}),
        **({} if tally.evaluation is None else {"private_evaluation": tally.evaluation.document()}),
    }
