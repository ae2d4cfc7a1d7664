"""Baselines: the same scenario but for one thing, sizes that match, and nodes alone that see nobody else's records."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from ledger_samples import entries_of
from test_own_models import scenario as own_scenario

from conclave.base.errors import BadInputError
from conclave.data.partition import partition
from conclave.data.sources import load as load_data
from conclave.model.building import build
from conclave.model.costs import costs_of
from conclave.model.store import load
from conclave.report.report import write_report
from conclave.server.run_directory import RunDirectory
from conclave.server.scenario import Scenario, read_scenario
from conclave.simulations.baseline_run import run_baseline
from conclave.simulations.baselines import KINDS, baseline, dense, size_match
from conclave.simulations.shipped import find
from conclave.simulations.simulate import simulate
from conclave.simulations.simulated_nodes import deal, open_simulated

FAST = {"federation.rounds": 3, "partition.nodes": 4}
OPEN = {"privacy.mechanism": "none", "privacy.sampling_rate": 1.0, "training.steps": 2, "training.learning_rate": 0.1}


def digits(**changes) -> Scenario:
    return read_scenario(find("digits"), FAST | changes)


def test_a_baseline_changes_what_it_says_and_nothing_else():
    before = digits(**{"federation.capacities": [8, 4], "federation.min_holders": 2})
    changed = {
        "central": {"partition", "federation"},
        "alone": {"partition", "federation"},
        "dense-total": {"model", "federation"},
        "dense-active": {"model", "federation"},
    }
    kept = ("rounds", "weights", "optimizer", "reply_timeout_s")
    for kind in KINDS:
        for after in baseline(before, kind):
            differ = {name for name in Scenario.model_fields if getattr(before, name) != getattr(after, name)}
            assert differ == changed[kind] | {"name", "description"}
            assert after.name == f"digits-{kind}"
            assert after.plan().noise_multiplier == before.plan().noise_multiplier
            assert all(getattr(after.federation, key) == getattr(before.federation, key) for key in kept)
            assert after.federation.experts_per_node == after.model.experts.routed  # every node has the whole model


def test_experts_that_stay_travel_in_a_baseline_and_one_node_has_no_node_level():
    for kind in KINDS:
        for after in baseline(digits(**{"federation.expert_scope": "mixed", "federation.local_experts": 3}), kind):
            assert (after.federation.expert_scope, after.plan().local_experts) == ("federated", 0)
    level = {
        "node_privacy": {"epsilon": 8.0, "delta": 1e-3, "clip": 1.0, "nodes": 4},
        "federation.cohort": {"kind": "poisson", "rate": 0.5},
        "federation.assignment": "random",
        "federation.weights": "uniform",
    }
    assert baseline(digits(**level), "dense-total")[0].node_privacy is not None
    for kind in ("central", "alone"):
        with pytest.raises(BadInputError, match=f"--baseline {kind}: .* must be poisson with node_privacy"):
            baseline(digits(**level), kind)


def test_a_long_name_stays_a_name():
    assert len(baseline(digits(name="x" * 64), "dense-active")[0].name) == 64


def test_dense_sizes_of_digits_by_closed_form():
    model = digits().model
    shared = 64 * 64 + 64 * 10  # embedding and head; there is no norm
    total = shared + 8 * (64 + 2 * 64 * 32)  # eight experts of two matrices, with their router rows
    active = shared + 8 * 64 + 2 * (2 * 64 * 32)
    for kind, wanted in (("dense-total", total), ("dense-active", active)):

        def size(hidden):
            return shared + 64 + 2 * 64 * hidden

        nearest = min(range(8, 1000, 8), key=lambda hidden: abs(size(hidden) - wanted))
        found = dense(model, kind)
        assert found.experts.hidden == nearest
        assert size_match(model, found, kind) == (wanted, size(nearest))
        assert costs_of(found).total == costs_of(found).active == size(nearest)


@pytest.mark.parametrize("kind", ["dense-total", "dense-active"])
@pytest.mark.parametrize(
    "changes",
    [
        {"experts.depth": 3, "preset": "deep-moe", "layers": 2},
        {"experts.activation": "swiglu", "experts.shared": 2},
        {"experts.router": {"kind": "hierarchical", "groups": 4, "top_groups": 2}},
        {"experts.router": {"kind": "policy", "rollouts": 2}},
        {"experts.hidden": 8, "experts.top_k": 1},
    ],
)
def test_no_other_width_comes_closer(kind, changes):
    model = digits(**{f"model.{key}": value for key, value in changes.items()}).model
    found = dense(model, kind)
    wanted, got = size_match(model, found, kind)
    assert wanted == getattr(costs_of(model), kind.removeprefix("dense-"))
    for step in (-8, 8):
        hidden = found.experts.hidden + step
        if hidden > 0:
            other = found.model_copy(update={"experts": found.experts.model_copy(update={"hidden": hidden})})
            assert abs(costs_of(other).total - wanted) >= abs(got - wanted)
    assert (found.experts.depth, found.experts.activation) == (model.experts.depth, model.experts.activation)


def test_a_dense_model_computes_what_two_matrices_do():
    model = dense(digits().model, "dense-active")
    network = build(model, seed=3)
    batch = {"image": torch.rand(5, 1, 8, 8)}
    weights = network.state_dict()
    x = (batch["image"].reshape(5, 64) - 0.3) @ weights["encoder.embed.weight"].T
    (experts,) = {name.rpartition("experts.")[0] for name in weights if "experts.up" in name}
    up, down = (weights[f"{experts}experts.{name}.weight"][0] for name in ("up", "down"))
    y = (x + torch.tanh(x @ up) @ down) @ weights["head.score.weight"].T
    torch.testing.assert_close(network(batch).scores, y)


def test_what_has_no_dense_counterpart_is_refused():
    with pytest.raises(BadInputError, match=r"--baseline dense-total: model\.source is sample_models:mixture"):
        baseline(own_scenario(), "dense-total")
    wide = {"model.experts.hidden": 65_536, "model.experts.routed": 8}
    with pytest.raises(BadInputError, match="need more than 65536 hidden values"):
        baseline(digits(**wide), "dense-total")


def test_central_is_a_federation_of_one_bit_for_bit(tmp_path):
    (central,) = baseline(digits(), "central")
    by_hand = read_scenario(
        find("digits"),
        {
            "name": "digits-central",
            "description": central.description,
            "federation.rounds": 3,
            "partition": {"scheme": "iid", "nodes": 1},
            "federation.experts_per_node": 8,
            "federation.assignment": "all",
        },
    )
    summary = run_baseline(digits(), "central", tmp_path / "a")
    simulate(by_hand, RunDirectory.create(by_hand, tmp_path / "b"))
    one, other = RunDirectory(tmp_path / "a"), RunDirectory(tmp_path / "b")
    assert (one.path / "model/model.safetensors").read_bytes() == (other.path / "model/model.safetensors").read_bytes()
    first, second = ([asdict(e) for e in entries_of(run.ledgers[0])] for run in (one, other))
    assert [(e["charge_id"], e["output_hash"]) for e in first] == [(e["charge_id"], e["output_hash"]) for e in second]
    assert (summary.bytes_per_node, summary.baseline.kind, len(one.ledgers)) == (0, "central", 1)
    assert 7.9 < summary.epsilon <= 8.0


def test_central_trains_on_all_records_as_a_plain_loop_does(tmp_path):
    scenario = digits(**OPEN, **{"federation.optimizer": {"kind": "sgd"}})
    run_baseline(scenario, "central", tmp_path / "run")
    data = load_data(scenario.data)
    network = build(scenario.model, scenario.seed)
    before = network.loss(data.train).mean()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(3 * 2):
        optimizer.zero_grad()
        (network.loss(data.train).sum() / 1400).backward()  # 1,437 records declare 1,400
        optimizer.step()
    trained = load(tmp_path / "run" / "model").state_dict()
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-4, atol=1e-5)
    assert network.loss(data.train).mean() < 0.95 * before


def test_nodes_alone_see_their_own_records_and_keep_who_they_are(tmp_path):
    before = digits()
    together = [open_simulated(before.to_toml(), str(tmp_path / "all"), number, 4) for number in range(4)]
    records = load_data(before.data).train
    shares = partition(records, before.partition, before.seed)
    seen = 0
    for number, alone in enumerate(baseline(before, "alone")):
        assert alone.nodes == 1
        assert len(deal(alone.to_toml())[2]) == 1
        node = open_simulated(alone.to_toml(), str(tmp_path / f"{number}"), 0, 1)
        assert node.records.keys() == together[number].records.keys()
        assert all(torch.equal(node.records[name], records[name][shares[number]]) for name in node.records)
        assert node.declared_size == together[number].declared_size
        assert node.describe().fingerprint == together[number].describe().fingerprint
        seen += len(node.records["label"])
    assert seen == len(records["label"])
    open_simulated.cache_clear()


def test_alone_leaves_a_run_for_each_node_and_their_mean(tmp_path):
    rounds = []
    summary = run_baseline(digits(), "alone", tmp_path / "run", rounds.append, on_run=write_report)
    runs = [RunDirectory.open(tmp_path / "run" / f"node-{number:04d}") for number in range(4)]
    accuracies = [run.metrics()[-1]["accuracy"] for run in runs]
    assert summary.accuracy == pytest.approx(sum(accuracies) / 4)
    note = json.loads((tmp_path / "run" / "baseline.json").read_text())
    assert note == {"kind": "alone", "of": "digits", "quality_of_nodes": accuracies}
    for number, run in enumerate(runs):
        assert run.scenario.partition.only == number
        assert run.report.is_file()
        assert [path.name for path in run.ledgers] == [f"node-{number:04d}.db"]
        assert all(line["asked"] == line["accepted"] == 1 for line in run.metrics())
    assert rounds == list(range(1, 13))
    assert 7.9 < summary.epsilon <= 8.0
