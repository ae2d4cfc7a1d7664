"""The audit of a run: receipts, ledgers and plan must tell one story, and every contradiction is named."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from conclave.audit.run import RunAudit, audit_run
from conclave.privacy.ledger import Entry, Genesis, SignedHead
from conclave.privacy.ledger.reading.history import LedgerFile, write_export
from conclave.privacy.randomness import derive
from conclave.server.run_directory import RunDirectory
from conclave.server.scenario import read_scenario
from conclave.simulations.shipped import find
from conclave.simulations.simulate import simulate

ROUNDS, NODES, SEED = 3, 3, 5


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> RunDirectory:
    changes = {"federation.rounds": ROUNDS, "partition.nodes": NODES, "seed": SEED, "model.width": 8}
    scenario = read_scenario(find("digits"), changes)
    run = RunDirectory.create(scenario, tmp_path_factory.mktemp("audit") / "run")
    simulate(scenario, run)
    return run


@pytest.fixture
def run(finished, tmp_path) -> RunDirectory:
    """A copy whose ledgers are exports, which a test may forge as their owner could: with the key."""
    shutil.copytree(finished.path, tmp_path / "run")
    copy = RunDirectory(tmp_path / "run")
    for path in copy.ledgers:
        with path.with_suffix(".jsonl").open("wb") as stream:
            write_export(LedgerFile(path), stream)
        path.unlink()
    return copy


def exports(run: RunDirectory) -> list[Path]:
    return sorted((run.path / "ledgers").glob("*.jsonl"))


def audit(run: RunDirectory) -> RunAudit:
    return audit_run(run, exports(run))


@dataclass
class Forged:
    """An owner's own history: whatever entries, chained and signed anew."""

    genesis: Genesis
    entries: list[Entry]
    head: SignedHead

    def lines(self):
        return iter([entry.line for entry in self.entries])


def forge(run: RunDirectory, number: int, change) -> None:
    """Rewrite the ledger of a node by ``change(entries) → entries``, with the node's own key."""
    path = exports(run)[number]
    genesis, *lines, _ = path.read_bytes().splitlines()
    genesis = Genesis.parse(genesis)
    previous, total, out = genesis.hash, 0, []
    for seq, entry in enumerate(change([Entry.parse(line) for line in lines]), start=1):
        total += int(entry.rdp_charge)
        out.append(replace(entry, seq=seq, prev_hash=previous, rdp_total=str(total)))
        previous = out[-1].hash
    key = Ed25519PrivateKey.from_private_bytes(
        derive(derive(SEED.to_bytes(32, "big"), "simulated node", number), "ledger key")
    )
    head = SignedHead.sign(key, genesis.ledger_id, len(out), previous)
    with path.open("wb") as stream:
        write_export(Forged(genesis, out, head), stream)


def edit_receipts(run: RunDirectory, change) -> None:
    lines = [json.loads(line) for line in run.receipts.read_text().splitlines()]
    run.receipts.write_text("".join(json.dumps(line) + "\n" for line in change(lines)))


def test_a_true_run_is_not_refuted(finished, run):
    for result in (audit_run(finished), audit(run)):
        assert (result.verdict, result.findings, result.missing_ledgers) == ("NOT_REFUTED", [], [])
        assert (result.rounds, result.nodes) == (ROUNDS, NODES)
        assert result.receipts == result.matched == ROUNDS * NODES
        assert result.unreceived == result.lost == 0
        assert 7.9 < result.epsilon <= 8.0
        assert result.plan_hash == finished.scenario.plan().hash


def test_a_ledger_that_is_not_at_hand_makes_it_incomplete(run):
    exports(run)[1].unlink()
    result = audit(run)
    assert (result.verdict, len(result.missing_ledgers), result.matched) == ("INCOMPLETE", 1, ROUNDS * (NODES - 1))
    run.receipts.write_text("")
    for line in run.metrics():
        line["accepted"] = 0
    assert audit(run).verdict == "VIOLATED"  # replies were averaged that no receipt shows


def test_an_older_copy_of_a_ledger_is_a_rollback(run):
    forge(run, 0, lambda entries: entries[:-3])  # without the last charge: reserved, committed, closed
    result = audit(run)
    assert result.verdict == "VIOLATED"
    assert any("but a receipt proves entry" in finding for finding in result.findings)
    assert any("round 3 was received, but no committed charge paid for it" in f for f in result.findings)


def test_an_export_from_before_many_rounds_is_said_in_two_sentences(run):
    forge(run, 0, lambda entries: entries[:1])
    path = exports(run)[0]
    assert audit(run).findings == [
        f"{path}: ends at entry 1, but {ROUNDS} receipts prove entries up to 7: "
        "entries are missing, or an export is too old",
        f"{path}: {ROUNDS} rounds from 1 to {ROUNDS} were received, but no committed charges paid for them",
    ]


def test_a_charge_taken_out_of_a_ledger_is_found(run):
    """The chain is whole and signed, the price and the total hold: only the receipts know."""
    forge(run, 0, lambda entries: [*entries[:1], *entries[3:]])  # without round one
    result = audit(run)
    assert result.ledgers[str(exports(run)[0])].charges == ROUNDS - 1
    assert any("round 1 was received, but no committed charge paid for it" in f for f in result.findings)


def test_charges_of_another_plan_are_found(run):
    forge(run, 2, lambda entries: [replace(entry, plan_hash="9" * 64) for entry in entries])
    assert any("is charged for another plan" in finding for finding in audit(run).findings)


def test_another_scenario_than_was_run_is_found(run):
    path = run.path / "scenario.toml"
    path.write_text(path.read_text().replace("epsilon = 8.0", "epsilon = 4.0"))
    result = audit(run)
    assert result.verdict == "VIOLATED"
    assert any("is for another plan" in finding for finding in result.findings)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda lines: [lines[0] | {"output_hash": "0" * 64}, *lines[1:]], "the output that arrived is not the one"),
        (lambda lines: [lines[0] | {"charge_id": "0" * 64}, *lines[1:]], "no committed charge paid for it"),
        (lambda lines: [lines[0] | {"round": 2}, *lines[1:]], "the charge is of round 1"),
        (lambda lines: [lines[0] | {"receipt": lines[3]["receipt"]}, *lines[1:]], "is not of the entry that committed"),
        (lambda lines: [*lines, lines[0] | {"round": 2}], "two receipts are for one charge"),
        (lambda lines: [lines[0] | {"run_id": "8"}, *lines[1:]], "the receipts are of 2 runs"),
        (lambda lines: lines[1:], "3 replies were averaged, but 2 have a receipt"),
        (
            lambda lines: [lines[0] | {"receipt": lines[0]["receipt"] | {"hash": "0" * 64}}, *lines[1:]],
            "not signed with the ledger's key",
        ),
    ],
)
def test_receipts_that_contradict_the_ledgers_are_found(run, change, sentence):
    edit_receipts(run, change)
    result = audit(run)
    assert result.verdict == "VIOLATED"
    assert any(sentence in finding for finding in result.findings), result.findings


def test_a_reply_that_was_lost_on_the_way_is_no_violation(run):
    """Three rounds were paid for; the third reply of a node never arrived, and nothing was averaged from it."""
    edit_receipts(run, lambda lines: lines[:-1])
    path = run.path / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[-1]["accepted"] -= 1
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = audit(run)
    assert (result.verdict, result.unreceived, result.findings) == ("NOT_REFUTED", 1, [])


def test_the_same_ledger_twice_is_said(run):
    result = audit_run(run, [*exports(run), exports(run)[0]])
    assert any("once more" in finding for finding in result.findings)
