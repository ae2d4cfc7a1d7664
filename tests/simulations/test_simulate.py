"""A whole simulation: reproducible, private, charged, and every part of it on disk."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from ledger_samples import entries_of
from run_samples import events
from safetensors.torch import load_file

from conclave.audit.run import audit_run
from conclave.base.errors import BadInputError
from conclave.model import parameters
from conclave.model.store import load
from conclave.privacy.ledger.reading.history import LedgerFile
from conclave.privacy.ledger.reading.spending import budget_of
from conclave.privacy.ledger.reading.verification import audit_history
from conclave.server.estimate import exchange_bytes_of
from conclave.server.rounds.checkpoint import read_checkpoint
from conclave.server.run_directory import RunDirectory
from conclave.server.scenario import read_scenario
from conclave.simulations.shipped import find
from conclave.simulations.simulate import run_number, simulate

MODEL = "model/model.safetensors"
FAST = {"federation.rounds": 3, "partition.nodes": 4}


def run(folder, **overrides):
    scenario = read_scenario(find("digits"), FAST | overrides)
    return simulate(scenario, RunDirectory.create(scenario, folder)), RunDirectory(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(tmp_path_factory.mktemp("run") / "a")


def test_the_same_seed_gives_identical_model_bytes_and_ledger_events(finished, tmp_path):
    _, first = finished
    _, second = run(tmp_path / "b")
    for name in ("model/model.safetensors", "model/model.json", "scenario.toml"):
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes()
    assert events(first) == events(second)


def test_the_number_of_a_run_does_not_change_with_versions():
    """It is a hash of the scenario as it was first written: a run directory goes on, and old seeds repeat old runs."""
    numbers = {name: run_number(read_scenario(find(name))) for name in ("digits", "digits-open", "stdlib-text")}
    assert numbers == {
        "digits": 68822578562937216,
        "digits-open": 39866477276329844,
        "stdlib-text": 937510018273701,
    }
    momentum = read_scenario(find("digits"), {"federation.optimizer.momentum": 0.5})
    assert run_number(momentum) == 42087931722039954
    changes = {"min_replies": 2, "step_scale": "contributions", "aggregation.kind": "median", "optimizer.kind": "adam"}
    changed = [read_scenario(find("digits"), {f"federation.{key}": value}) for key, value in changes.items()]
    assert len({run_number(scenario) for scenario in changed} | {numbers["digits"]}) == 5


def test_another_seed_gives_another_model_and_other_events(finished, tmp_path):
    _, first = finished
    _, other = run(tmp_path / "c", seed=77)
    name = "model/model.safetensors"
    assert (first.path / name).read_bytes() != (other.path / name).read_bytes()
    assert not {e["charge_id"] for node in events(first) for e in node} & {
        e["charge_id"] for node in events(other) for e in node
    }


@pytest.mark.parametrize("change", [{"seed": 77}, {"federation.rounds": 4}])
def test_a_scenario_that_was_edited_is_refused_before_its_nodes_meet_the_ledgers(finished, tmp_path, caplog, change):
    _, directory = finished
    copy = tmp_path / "copy"
    shutil.copytree(directory.path, copy)
    edited = RunDirectory(copy)
    (copy / "scenario.toml").write_text(read_scenario(copy / "scenario.toml", change).to_toml())
    with pytest.raises(BadInputError, match=r"round\.safetensors: belongs to another plan"):
        simulate(edited.scenario, edited)
    assert caplog.records == []  # other keys than the ledgers' would have been
    for path in directory.ledgers:
        assert entries_of(copy / "ledgers" / path.name) == entries_of(path)


def test_every_node_is_charged_once_a_round_and_stays_within_its_budget(finished):
    summary, directory = finished
    assert len(directory.ledgers) == 4
    for path in directory.ledgers:
        result = audit_history(LedgerFile(path))
        assert result.findings == []
        assert result.charges == 3
        assert [entry.round for entry in entries_of(path) if entry.state == "COMMITTED"] == [1, 2, 3]
        assert 7.9 < result.epsilon <= 8.0  # σ uses the budget up, and no more
        assert all(entry.rng == "seeded" for entry in entries_of(path) if entry.state != "CLOSED")
        assert [entry.state for entry in entries_of(path)] == ["ADMITTED", *["RESERVED", "COMMITTED"] * 3, "CLOSED"]
    assert summary.epsilon == max(budget_of(LedgerFile(path)).spent for path in directory.ledgers)


def test_the_run_directory_holds_the_whole_run(finished):
    summary, directory = finished
    assert RunDirectory.open(directory.path).scenario.federation.rounds == 3
    lines = directory.metrics()
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert lines[-1]["accuracy"] == summary.accuracy
    assert all(line["accepted"] == 4 and line["dropped"] == 0 and not line["refused"] for line in lines)
    assert sum(lines[-1]["load"][0]) == pytest.approx(1.0)
    environment = json.loads((directory.path / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    network = load(directory.path / "model")
    wire = parameters.split(network.state_dict(), network.held)
    checkpoint = read_checkpoint(directory.checkpoint)
    assert checkpoint.round == 3
    assert all(torch.equal(tensor, wire[name]) for name, tensor in checkpoint.tensors.items())
    assert load_file(directory.path / "model/model.safetensors").keys() == wire.keys()


def test_a_node_exchanges_its_part_of_the_model_and_no_more(finished):
    _, directory = finished
    config = directory.scenario.model
    line = directory.metrics()[-1]

    def tensor_bytes(held):
        return 4 * sum(shape.numel() for shape in parameters.shapes(config, held).values())

    part, whole = tensor_bytes({0: (0, 1, 2, 3)}), tensor_bytes(config.all_experts)
    overhead = 8192  # documents, tensor names, Flower's object headers
    assert part < line["bytes_up_per_node"] < part + overhead
    assert part < line["bytes_down_per_node"] < part + overhead
    assert 2 * whole < line["bytes_full_model"] < 2 * (whole + overhead)


def test_the_metrics_count_the_holders_of_every_expert(tmp_path):
    changes = {"federation.capacities": [8, 2], "federation.assignment": "sticky", "federation.min_holders": 1}
    _, directory = run(tmp_path / "h", **changes)
    first, *others = directory.metrics()
    assert all(line["holders"] == first["holders"] for line in others)
    assert sum(first["holders"][0]) == 4 + 2 + 4 + 2
    assert min(first["holders"][0]) >= 1
    assert others[-1]["holders_mean"] == first["holders"]
    assert others[-1]["rounds_without_holder"] == [[0] * 8]


def test_without_privacy_says_so_everywhere(tmp_path):
    summary, directory = run(tmp_path / "d", **{"privacy.mechanism": "none"})
    assert summary.epsilon == float("inf")
    assert {e["rdp_charge"] for node in events(directory) for e in node if e["state"] == "RESERVED"} == {"inf"}


def test_partial_cohorts_charge_only_who_took_part(tmp_path):
    _, directory = run(tmp_path / "e", **{"federation.cohort": {"kind": "fixed", "size": 2}, "partition.nodes": 6})
    charged = [sum(e["state"] == "COMMITTED" for e in node) for node in events(directory)]
    assert sum(charged) == 3 * 2
    assert all(line["asked"] == line["accepted"] == 2 for line in directory.metrics())


def test_a_round_that_finds_nobody_changes_nothing_and_costs_nothing(tmp_path):
    _, directory = run(tmp_path / "f", **{"federation.cohort": {"kind": "poisson", "rate": 1e-9}})
    assert all(line["asked"] == 0 for line in directory.metrics())
    assert len({line["loss"] for line in directory.metrics()}) == 1
    assert all([entry["state"] for entry in node] == ["ADMITTED", "CLOSED"] for node in events(directory))


SMALL = {"traffic.delta": "int8", "traffic.model": "bf16"}


def test_every_receipt_of_rounded_traffic_is_of_a_committed_output(tmp_path):
    _, directory = run(tmp_path / "rounded", **SMALL)
    assert all(line["accepted"] == 4 and line["dropped"] == 0 for line in directory.metrics())
    result = audit_run(directory)
    assert (result.verdict, result.matched, result.findings) == ("NOT_REFUTED", 12, [])


@pytest.mark.parametrize(("delta", "model", "up", "down"), [("int8", "bf16", 1, 2), ("bf16", "fp32", 2, 4)])
def test_rounded_traffic_takes_what_its_types_take(tmp_path, delta, model, up, down):
    changes = FAST | {"traffic.delta": delta, "traffic.model": model, "federation.rounds": 2}
    scenario = read_scenario(find("digits"), changes)
    directory = RunDirectory.create(scenario, tmp_path / "run")
    simulate(scenario, directory)
    line = directory.metrics()[-1]
    shapes = parameters.shapes(scenario.model, {0: (0, 1, 2, 3)}).values()
    values, rows = sum(s.numel() for s in shapes), sum(s[0] if len(s) > 1 else 1 for s in shapes)
    scales = 2 * rows if delta == "int8" else 0
    assert up * values + scales < line["bytes_up_per_node"] < up * values + scales + 4096
    assert down * values < line["bytes_down_per_node"] < down * values + 8192
    estimate = exchange_bytes_of(scenario)
    assert (line["bytes_down_per_node"], line["bytes_up_per_node"]) == pytest.approx(estimate[:2], abs=64)
    assert line["bytes_full_model"] == pytest.approx(estimate[2], abs=64)
