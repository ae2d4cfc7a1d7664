"""The plan says beforehand what the run then does."""

from __future__ import annotations

import pytest
from ledger_samples import entries_of

from conclave.privacy.ledger.reading.history import LedgerFile
from conclave.server.run_directory import RunDirectory
from conclave.server.scenario import read_scenario
from conclave.simulations.estimate import estimate_simulated
from conclave.simulations.shipped import find
from conclave.simulations.simulate import simulate

CHANGES = {"federation.rounds": 3, "partition.nodes": 4, "training.steps": 2}


def test_the_plan_is_what_the_run_comes_to(tmp_path):
    scenario = read_scenario(find("digits"), CHANGES)
    estimate = estimate_simulated(scenario)
    run = RunDirectory.create(scenario, tmp_path / "run")
    summary = simulate(scenario, run)
    ledger = LedgerFile(run.ledgers[0])
    reserved = [entry for entry in entries_of(run.ledgers[0]) if entry.state == "RESERVED"]
    assert (estimate.rounds, estimate.steps) == (3, 6)
    assert estimate.epsilon == pytest.approx(summary.epsilon, abs=1e-9)
    assert f'"sigma":"{estimate.noise_multiplier}"' in reserved[0].mechanism_text
    assert estimate.order == float(ledger.genesis.order)
    line = run.metrics()[-1]
    # lengths of numbers in the documents differ by a few bytes; tensors and their names do not
    assert line["bytes_down_per_node"] == pytest.approx(estimate.bytes_down, abs=64)
    assert line["bytes_up_per_node"] == pytest.approx(estimate.bytes_up, abs=64)
    assert line["bytes_full_model"] == pytest.approx(estimate.bytes_full_model, abs=64)
    assert 0 < estimate.parameters_per_node < estimate.parameters_total
    assert estimate.accountants["pld"] <= estimate.accountants["rdp"] <= estimate.epsilon + 1e-9
    assert estimate.seconds_total == pytest.approx(estimate.seconds_per_node_round * 3 * 4)


def test_partial_cohorts_and_no_privacy():
    some = estimate_simulated(
        read_scenario(find("digits"), CHANGES | {"federation.cohort": {"kind": "fixed", "size": 2}})
    )
    assert some.seconds_total == pytest.approx(some.seconds_per_node_round * 3 * 2)
    none = estimate_simulated(read_scenario(find("digits-open"), CHANGES))
    assert (none.epsilon, none.noise_multiplier, none.accountants) == (float("inf"), None, {})
