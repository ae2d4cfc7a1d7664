"""A whole run with balancing: charged once, resumable, and told in report and plan."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from ledger_samples import entries_of
from safetensors.torch import load_file

from conclave.audit.model import audit_scenario
from conclave.audit.run import audit_run
from conclave.model import parameters
from conclave.privacy.accounting.mechanisms import joint_noise
from conclave.report.report import write_report
from conclave.server.rounds.checkpoint import write_checkpoint
from conclave.server.run_directory import RunDirectory
from conclave.server.scenario import read_scenario
from conclave.simulations.estimate import estimate_simulated
from conclave.simulations.shipped import find
from conclave.simulations.simulate import simulate

CHANGES = {
    "federation.rounds": 4,
    "partition.nodes": 4,
    "model.experts.hidden": 8,
    "federation.optimizer.momentum": 0.5,
    "model.experts.router": {"kind": "sigmoid"},
    "balancing": {"share": 0.05, "rate": 0.01},
}


def scenario():
    return read_scenario(find("digits"), CHANGES)


def start(folder):
    return RunDirectory.create(scenario(), folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = start(tmp_path_factory.mktemp("balancing") / "run")
    return directory, simulate(scenario(), directory)


def weights(directory):
    return (directory.path / "model" / "model.safetensors").read_bytes()


def biases(directory):
    wire = load_file(directory.path / "model" / "model.safetensors")
    return [float(wire[f"router/0/{expert}/selection_bias"]) for expert in range(8)]


def test_biases_move_by_the_released_loads(finished):
    directory, _ = finished
    expected = [0.0] * 8
    for line in directory.metrics():
        (loads,) = line["private_load"]
        known = [load for load in loads if load is not None]
        mean = sum(known) / len(known)
        for expert, load in enumerate(loads):
            if load is not None:
                expected[expert] += 0.01 if load < mean else -0.01
    assert biases(directory) == pytest.approx(expected, abs=1e-6)
    assert any(expected)


def test_every_charge_pays_for_both_releases_at_the_price_of_one(finished):
    directory, summary = finished
    assert summary.epsilon <= 8.0
    audit = audit_run(directory)
    assert (audit.verdict, audit.findings) == ("NOT_REFUTED", [])
    sigma = scenario().plan().noise_multiplier
    for path in directory.ledgers:
        assert len(audit.ledgers[str(path)].joint) == 1
        for entry in entries_of(path):
            if entry.state == "RESERVED":
                mechanism = json.loads(entry.mechanism_text)
                assert float(mechanism["sigma"]) == sigma
                assert mechanism["parts"].keys() == {"delta", "loads"}
                assert sigma <= joint_noise(map(float, mechanism["parts"].values())) <= sigma * (1 + 1e-15)


def test_a_crash_changes_nothing(finished, tmp_path, monkeypatch):
    directory, _ = finished
    resumed = start(tmp_path / "resumed")

    def dies_in_round_3(path, checkpoint):
        if checkpoint.round == 3:
            raise KeyboardInterrupt
        write_checkpoint(path, checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr("conclave.server.record.write_checkpoint", dies_in_round_3)
        with pytest.raises(KeyboardInterrupt):
            simulate(scenario(), resumed)
    simulate(scenario(), resumed)
    assert weights(resumed) == weights(directory)
    assert [line["private_load"] for line in resumed.metrics()] == [
        line["private_load"] for line in directory.metrics()
    ]


def test_the_plan_shows_the_parts_and_the_bytes(finished):
    directory, _ = finished
    estimate = estimate_simulated(scenario())
    assert estimate.load_share == 0.05
    assert estimate.noise_parts == scenario().plan().noise_parts
    assert directory.metrics()[-1]["bytes_up_per_node"] == pytest.approx(estimate.bytes_up, abs=64)
    assert "noise_parts" in asdict(estimate)


def test_the_report_shows_the_released_loads(finished):
    page = write_report(finished[0]).read_text()
    assert "released by nodes, noised" in page
    assert "two releases from each sample that are one event" in page


def test_the_model_audit_covers_the_histogram():
    found = {finding.check: finding.violation for finding in audit_scenario(scenario())}
    assert {"load sensitivity", "load noise"} < found.keys()
    assert not any(found.values()), found


def test_names_of_loads_are_no_parameters():
    with pytest.raises(ValueError, match="not a parameter name"):
        parameters.owner("load/0")
