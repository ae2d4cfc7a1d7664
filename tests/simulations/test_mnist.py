"""The scenario mnist, on tiny files in the right format: the same verbs as for every other scenario."""

from __future__ import annotations

import pytest
from idx_samples import write_mnist

import conclave.cli.main
from conclave.base.errors import BadInputError
from conclave.data.config import DataConfig
from conclave.data.data_folder import DATA_VARIABLE
from conclave.data.sources import load
from conclave.model.costs import costs_of
from conclave.report.predict import predict
from conclave.server.estimate import exchange_bytes_of
from conclave.server.run_directory import RunDirectory
from conclave.server.scenario import read_scenario
from conclave.simulations.estimate import estimate_simulated
from conclave.simulations.shipped import find
from conclave.simulations.simulate import simulate

SMALL = {
    "federation.rounds": 2,
    "federation.optimizer.warmup_rounds": 0,
    "partition.nodes": 2,
    "partition.min_records": 1,
    "training.steps": 1,
    "federation.min_holders": 0,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "data"))
    write_mnist(tmp_path / "data" / "mnist", train=80, test=20)
    return tmp_path


@pytest.mark.parametrize("scheme", ["dirichlet", "iid"])
def test_it_is_simulated_and_predicts(folder, scheme):
    changes = SMALL | {"partition.scheme": scheme}
    if scheme == "iid":
        del changes["partition.min_records"]  # iid has no such key, and the file's alpha is forgotten
    scenario = read_scenario(find("mnist"), changes)
    run = RunDirectory.create(scenario, folder / "run")
    summary = simulate(scenario, run)
    assert (summary.rounds, len(run.ledgers)) == (2, 2)
    assert summary.epsilon == pytest.approx(3.0, abs=1e-3)
    prediction = predict(folder / "run", "mnist:7")
    assert prediction.truth == int(load(DataConfig(source="mnist")).test["label"][7])
    assert sum(prediction.probabilities) == pytest.approx(1.0)
    with pytest.raises(BadInputError, match="mnist:20: must be mnist:0 to mnist:19"):
        predict(folder / "run", "mnist:20")


def test_without_the_files_it_can_be_planned_and_described_but_not_run(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    for command in (["scenarios"], ["plan", "mnist"], ["model", "mnist"]):
        with pytest.raises(SystemExit) as done:
            conclave.cli.main.app([*command, "--json"])
        assert done.value.code in (0, None)
        assert "mnist" in capsys.readouterr().out or command == ["plan", "mnist"]
    scenario = read_scenario(find("mnist"))
    with pytest.raises(BadInputError, match=f"{DATA_VARIABLE} is not set"):
        simulate(scenario, RunDirectory.create(scenario, tmp_path / "run"))


def test_the_estimate_takes_the_published_size_where_the_files_are_not_here(monkeypatch, tmp_path):
    scenario = read_scenario(find("mnist"), {"privacy.sampling_rate": 0.001})
    seen = []
    monkeypatch.setattr(
        "conclave.simulations.estimate.estimate", lambda _, *, units_per_node: seen.append(units_per_node)
    )
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    estimate_simulated(scenario)
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    write_mnist(tmp_path, train=400)
    estimate_simulated(scenario)
    assert seen == [6000, 40]


def test_experts_are_most_of_the_model_half_of_them_travel_and_a_node_sends_less_than_a_quarter_of_it():
    scenario = read_scenario(find("mnist"))
    costs = costs_of(scenario.model)
    assert costs.parameters["expert"] > 0.8 * costs.total
    _, up, _ = exchange_bytes_of(scenario)
    assert scenario.federation.experts_per_node == scenario.model.experts.routed / 2
    assert up < 4 * costs.total / 4  # of the whole model in float32, one way
