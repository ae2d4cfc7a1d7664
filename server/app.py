"""The Flower ServerApp: describe nodes, run the rounds, evaluate on public data, write the run directory."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp

from data.shipped_scenarios import scenario_text
from data.simulated_run import simulated_run_dir
from data.sources import load
from model import BadInputError, build, parameters
from server.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from server.evaluation import Evaluation, evaluate
from server.receipts import ReceiptBook
from server.roster import Roster
from server.run_directory import RunDirectory
from server.scenario import Scenario, parse_scenario
from server.strategy import ExpertStrategy

log = logging.getLogger("conclave.server")

app = ServerApp()


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
    roster = Roster(grid, scenario, plan, run_id)
    strategy = ExpertStrategy(
        plan=plan,
        config=scenario.federation,
        seed=scenario.seed,
        run_id=run_id,
        nodes=roster.describe(),
        tensors=parameters.split(network.state_dict(), network.held),
        scenario=scenario.name,
        receipts=ReceiptBook(run.receipts),
    )
    strategy.summary()
    full_bytes = strategy.full_model_bytes()
    done = _restore(strategy, run, plan.hash)
    if done < scenario.federation.rounds:
        strategy.meet(roster.admit())
    for round_number in range(done + 1, scenario.federation.rounds + 1):
        started = time.perf_counter()
        if round_number > done + 1 and roster.refresh():
            strategy.meet(roster.members())
        requests = strategy.configure_train(round_number, ArrayRecord(), ConfigRecord(), grid)
        replies = grid.send_and_receive(requests, timeout=scenario.federation.reply_timeout_s)
        strategy.aggregate_train(round_number, replies)
        wire = strategy.optimizer.snapshot()
        evaluation = evaluate(scenario.model, wire, test)
        seconds = time.perf_counter() - started
        # Metrics first: a round that has a checkpoint has its metrics, and resuming drops those without one.
        run.append_metrics(_metrics(round_number, strategy, evaluation, full_bytes, seconds))
        checkpoint = Checkpoint(round_number, run_id, plan.hash, wire, strategy.optimizer.state())
        write_checkpoint(run.checkpoint, checkpoint)
        log.info("round %d: loss %.4f", round_number, evaluation.loss)
    run.save_model(scenario.model, strategy.optimizer.snapshot())
    roster.close()


def _restore(strategy: ExpertStrategy, run: RunDirectory, plan_hash: str) -> int:
    """Put the checkpointed state back, if there is one; return the last round that is done."""
    if not run.checkpoint.exists():
        run.keep_metrics(0)
        return 0
    checkpoint = read_checkpoint(run.checkpoint)
    if checkpoint.plan_hash != plan_hash or checkpoint.run_id != strategy.run_id:
        raise BadInputError(f"{run.checkpoint}: belongs to another plan, must be of the scenario beside it")
    strategy.optimizer.restore(checkpoint.tensors, checkpoint.optimizer)
    run.keep_metrics(checkpoint.round)
    return checkpoint.round


def _metrics(
    round_number: int, strategy: ExpertStrategy, evaluation: Evaluation, full_bytes: int, seconds: float
) -> dict[str, Any]:
    tally = strategy.tally
    return {
        "round": round_number,
        **{name: value for name, value in asdict(evaluation).items() if value is not None},
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
    }
