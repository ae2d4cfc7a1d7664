"""Private evaluation in a whole run: no unit on both sides, paid and receipted, and near the truth."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from ledger_samples import entries_of

from conclave.audit.run import audit_run
from conclave.base.errors import BadInputError
from conclave.model.store import load
from conclave.privacy.ledger import Genesis, SignedHead
from conclave.privacy.ledger.entry import Entry
from conclave.privacy.ledger.reading.history import LedgerFile, write_export
from conclave.privacy.randomness import derive
from conclave.report.report import write_report
from conclave.server.run_directory import RunDirectory
from conclave.server.scenario import read_scenario
from conclave.simulations.estimate import estimate_simulated
from conclave.simulations.shipped import find
from conclave.simulations.simulate import simulate
from conclave.simulations.simulated_nodes import deal, open_simulated

NODES, ROUNDS, SEED = 4, 5, 3
CHANGES = {
    "federation.rounds": ROUNDS,
    "partition.nodes": NODES,
    "seed": SEED,
    "model.width": 16,
    "evaluation": {"every": 2, "held_out": 0.3, "experts": "all"},
}


def run_of(folder, changes):
    scenario = read_scenario(find("digits"), changes)
    run = RunDirectory.create(scenario, folder)
    return simulate(scenario, run), run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("held-out") / "run", CHANGES)


def nodes_of(run):
    found = [open_simulated(run.scenario.to_toml(), str(run.path), number, NODES) for number in range(NODES)]
    open_simulated.cache_clear()
    return found


def rows(records):
    return [tuple(image.flatten().tolist()) for image in records["image"]]


def test_no_unit_is_on_both_sides_and_none_is_lost(finished):
    _, run = finished
    for node, index in zip(nodes_of(run), deal(run.scenario.to_toml())[2], strict=True):
        dataset = deal(run.scenario.to_toml())[1]
        train, aside = rows(node.records), rows(node.held_out.records)
        assert train
        assert aside
        assert not set(train) & set(aside)
        assert sorted(train + aside) == sorted(rows({"image": dataset.train["image"][torch.from_numpy(index)]}))


def test_evaluations_come_when_due_and_the_last_round_ends_with_one(finished):
    summary, run = finished
    assert [line["round"] for line in run.metrics() if "private_evaluation" in line] == [2, 4, 5]
    assert summary.held_out == run.metrics()[-1]["private_evaluation"]
    assert summary.held_out["asked"] == NODES
    assert 0.0 < summary.held_out_epsilon <= 8.0
    assert summary.epsilon <= 8.0
    for path in run.held_out_ledgers:
        entries = entries_of(path)
        assert [e.round for e in entries if e.state == "COMMITTED"] == [2, 4, 5]
        assert {e.releases for e in entries if e.state == "COMMITTED"} == {'["metrics"]'}
        assert entries[-1].state == "CLOSED"


def test_the_private_figure_is_near_the_exact_one(finished):
    """Six standard errors of the noise: a false alarm has probability 2e-9, and the seed is fixed."""
    summary, run = finished
    network = load(run.path / "model")
    right = count = 0
    for node in nodes_of(run):
        records = node.held_out.records
        with torch.inference_mode():
            right += int((network(records).scores.argmax(1) == records["label"]).sum())
        count += len(records["label"])
    value, noise = summary.held_out["over_units"]
    assert abs(value - right / count) < 6 * noise


def test_all_experts_without_noise_is_the_exact_figure(tmp_path):
    changes = CHANGES | {"privacy.mechanism": "none"}
    summary, run = run_of(tmp_path / "run", changes)
    network = load(run.path / "model")
    per_node = {}
    for node in nodes_of(run):
        records = node.held_out.records
        with torch.inference_mode():
            right = (network(records).scores.argmax(1) == records["label"]).double()
        per_node[node.describe().fingerprint] = right
    assert {name: pair[0] for name, pair in summary.held_out["by_node"].items()} == pytest.approx(
        {name: float(right.mean()) for name, right in per_node.items()}, abs=1e-6
    )
    assert summary.held_out["over_units"] == pytest.approx([float(torch.cat([*per_node.values()]).mean()), 0], abs=1e-6)
    assert summary.held_out_epsilon == float("inf")


def test_the_audit_covers_both_ledgers_of_a_node(finished):
    _, run = finished
    audit = audit_run(run)
    assert (audit.verdict, audit.nodes, len(audit.ledgers), len(audit.held_out)) == ("NOT_REFUTED", NODES, 4, 4)
    assert audit.receipts == audit.matched == NODES * (ROUNDS + 3)
    assert (audit.epsilon, audit.held_out_epsilon) == pytest.approx((8.0, 8.0), abs=0.01)


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished[1].path, tmp_path / "run")
    return RunDirectory(tmp_path / "run")


def forged(run, number: int, **changes):
    """Exports of a node's held-out ledger with another genesis, chained and signed anew with its own key."""
    path = run.held_out_ledgers[number]
    with path.with_suffix(".jsonl").open("wb") as stream:
        write_export(LedgerFile(path), stream)
    path.unlink()
    export = path.with_suffix(".jsonl")
    first, *lines, _ = export.read_bytes().splitlines()
    genesis = replace(Genesis.parse(first), **changes)
    previous, out = genesis.hash, [genesis.line]
    for line in lines:
        entry = replace(Entry.parse(line), prev_hash=previous)
        previous = entry.hash
        out.append(entry.line)
    root = derive(SEED.to_bytes(32, "big"), "simulated node", number)
    key = Ed25519PrivateKey.from_private_bytes(derive(root, "held-out key"))
    head = SignedHead.sign(key, genesis.ledger_id, len(lines), previous)
    export.write_bytes(b"\n".join([*out, head.line]) + b"\n")
    return export


@pytest.mark.parametrize("change", [{"split_key": "00" * 32}, {"held_out": "0.5"}, {"dataset_id": "digits/node-9"}])
def test_a_ledger_that_divides_the_data_otherwise_is_found(copy, change):
    audit = audit_run(copy, [forged(copy, 1, **change)])
    assert audit.verdict == "VIOLATED"
    assert any(f"differ in {next(iter(change))}" in finding for finding in audit.findings)


def test_an_evaluation_without_a_receipt_is_found(copy):
    lines = copy.receipts.read_text().splitlines(keepends=True)
    copy.receipts.write_text("".join(line for line in lines if json.loads(line)["kind"] != "evaluate"))
    audit = audit_run(copy)
    assert audit.verdict == "VIOLATED"
    assert "round 2: a node's evaluation has no receipt" in audit.findings


def test_a_training_reply_is_not_receipted_by_an_evaluation(copy):
    """Both are of one round and one node; each needs its own."""
    lines = [json.loads(line) for line in copy.receipts.read_text().splitlines()]
    kept = [line for line in lines if (line["kind"], line["round"]) != ("train", 2)]
    copy.receipts.write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert any("round 2: 4 replies were averaged, but 0 have a receipt" in f for f in audit_run(copy).findings)


def test_a_missing_ledger_of_held_out_units_makes_the_audit_incomplete(copy):
    copy.held_out_ledgers[0].unlink()
    audit = audit_run(copy)
    assert audit.verdict == "INCOMPLETE"
    assert [name.partition(" ")[2] for name in audit.missing_ledgers] == ["(held-out units)"]


def test_the_report_and_the_plan_tell_it(finished):
    _, run = finished
    page = write_report(run).read_text()
    assert "Held-out units" in page
    assert "of each node's units never train" in page
    estimate = estimate_simulated(run.scenario)
    assert (estimate.evaluations, estimate.evaluation_noise) == (3, run.scenario.plan().evaluation.noise_multiplier)


def test_text_is_measured_in_bits_and_whole_groups_are_held_out(tmp_path):
    changes = {
        "federation.rounds": 2,
        "partition.nodes": 3,
        "model.width": 16,
        "model.experts.hidden": 8,
        "data.test_records": 60,
        "privacy.unit": "group",
        "privacy.records_per_unit": 4,
        "privacy.sampling_rate": 0.5,
        "evaluation": {"every": 2, "held_out": 0.4, "epsilon": 50.0},
    }
    scenario = read_scenario(find("stdlib-text"), changes)
    run = RunDirectory.create(scenario, tmp_path / "run")
    summary = simulate(scenario, run)
    assert summary.held_out["metric"] == "bits_per_byte"
    assert 4.0 < summary.held_out["over_units"][0] < 8.0
    assert {LedgerFile(path).genesis.epsilon for path in run.held_out_ledgers} == {"50"}
    for number in range(3):
        node = open_simulated(run.scenario.to_toml(), str(run.path), number, 3)
        assert not set(node.records["group"].tolist()) & set(node.held_out.records["group"].tolist())
    open_simulated.cache_clear()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"evaluation": {"held_out": 0.0}}, "evaluation.held_out"),
        ({"evaluation": {"every": 0}}, "evaluation.every"),
        ({"evaluation": {"experts": "all"}, "federation.expert_scope": "local"}, "must be assigned"),
        (
            {
                "evaluation": {},
                "node_privacy": {"epsilon": 8.0, "delta": 1e-5, "clip": 1.0, "nodes": 10},
                "federation.cohort.kind": "poisson",
                "federation.cohort.rate": 0.5,
                "federation.assignment": "random",
                "federation.weights": "uniform",
            },
            "must be left out with node_privacy",
        ),
    ],
)
def test_what_cannot_be_is_refused(changes, named):
    with pytest.raises(BadInputError, match=named):
        read_scenario(find("digits"), changes)


def test_without_the_section_nothing_is_held_out(tmp_path):
    changes = {name: value for name, value in CHANGES.items() if name != "evaluation"} | {"federation.rounds": 1}
    summary, run = run_of(tmp_path / "run", changes)
    assert (summary.held_out, summary.held_out_epsilon, run.held_out_ledgers) == (None, None, [])
    assert "held_out" not in json.loads(LedgerFile(run.ledgers[0]).genesis.line)
