"""Starting again from a copy: what is proven costs nothing, everything else costs what is left."""

from __future__ import annotations

import shutil
import sqlite3

import pytest
from ledger_samples import KEY, MACHINE, genesis, new_ledger, request, spend
from ledger_tampering import NEW_KEY, STRANGER, edit

from conclave.base.errors import BadInputError
from conclave.privacy.ledger import (
    BudgetExhaustedError,
    ChargeAbandonedError,
    Ledger,
    PlanClosedError,
    ReplyExpiredError,
    SignedHead,
    StoredReply,
)
from conclave.privacy.ledger.reading.history import LedgerFile, open_history, write_export
from conclave.privacy.ledger.reading.verification import audit_history
from conclave.privacy.ledger.upkeep.recovery import recover
from conclave.privacy.ledger.witness import Witness

CHEAP = request(sigma=20.0)


def export_of(ledger, path):
    with path.open("wb") as out:
        write_export(open_history(ledger.path), out)
    return path


class Deployed:
    """A deployment ledger, its witness and a backup made after two of four charges."""

    def __init__(self, folder):
        self.folder = folder
        self.witness = Witness(folder / "witness" / "head.json")
        self.path, self.backup = folder / "ledger.db", folder / "backup.db"
        self.ledger = new_ledger(folder, mode="deployment", witness=self.witness)
        spend(self.ledger, 2, sigma=20.0)
        self.short = export_of(self.ledger, folder / "short.jsonl")
        self.ledger.close()
        shutil.copy(self.path, self.backup)
        self.ledger = self.open()
        spend(self.ledger, 2, sigma=20.0)
        self.long = export_of(self.ledger, folder / "long.jsonl")
        self.lost = [self.ledger.head]
        self.spent = self.ledger.epsilon_spent
        self.ledger.close()

    def restore(self):
        shutil.copy(self.backup, self.path)

    def open(self, machine=MACHINE, key=KEY, **options):
        return Ledger(self.path, key, **({"witness": self.witness, "machine": machine} | options))

    def recover(self, machine=MACHINE, key=KEY, **options):
        return recover(self.path, key, **({"witness": self.witness, "machine": machine} | options))

    def audit(self, **options):
        return audit_history(LedgerFile(self.path), **options)


@pytest.fixture
def node(tmp_path):
    return Deployed(tmp_path)


def test_a_backup_without_evidence_costs_all_that_is_left(node):
    node.restore()
    with pytest.raises(BadInputError, match="older copy"):
        node.open()
    result = node.recover()
    assert (result.proven, result.regained) == (False, 0)
    ledger = node.open()
    entries = ledger.entries()
    assert (entries[-1].state, entries[-1].rdp_total) == ("RESTORED", ledger.genesis.rdp_budget)
    assert result.charged == int(entries[-1].rdp_charge) > 0
    assert ledger.epsilon_spent == pytest.approx(8.0)
    for sigma in (20.0, 500.0):
        with pytest.raises(BudgetExhaustedError):
            ledger.reserve(request(50, sigma=sigma), bytes(32))
    assert node.witness.read() == ledger.head
    audit = node.audit(witness=node.witness.read(), receipts=node.lost)
    assert (audit.findings, audit.restored, audit.unproven) == ([], 1, True)
    assert audit.epsilon == ledger.epsilon_spent
    assert isinstance(ledger.reserve(CHEAP, bytes(32)), StoredReply)  # what was paid for is still there


def test_a_second_restore_charges_nothing_more_and_stays_spent(node):
    node.restore()
    node.recover()
    node.ledger = node.open()
    node.ledger.close()
    result = node.recover(witness=Witness(node.folder / "new-witness"))
    assert (result.proven, result.charged) == (False, 0)
    assert node.audit().findings == []


def test_a_complete_export_proves_that_nothing_is_missing(node):
    node.restore()
    result = node.recover(evidence=node.long)
    assert (result.proven, result.regained, result.charged) == (True, 4, 0)
    ledger = node.open()
    assert ledger.epsilon_spent == node.spent
    audit = node.audit(witness=node.witness.read(), receipts=node.lost)
    assert (audit.findings, audit.restored, audit.unproven, audit.committed) == ([], 1, False, 4)
    with pytest.raises(ReplyExpiredError):  # an export has no replies
        ledger.reserve(request(4, sigma=20.0), bytes(32))
    spend(ledger, 1, sigma=20.0)
    assert node.audit(receipts=node.lost).findings == []


def test_an_export_that_is_too_old_proves_nothing(node):
    node.restore()
    result = node.recover(evidence=node.short)
    assert (result.proven, result.regained) == (False, 0)
    assert result.charged > 0
    assert node.open().epsilon_spent == pytest.approx(8.0)


def test_an_export_from_in_between_is_taken_over_but_the_rest_is_charged(node):
    lines = node.long.read_bytes().splitlines(keepends=True)
    db = LedgerFile(node.path)
    row = sqlite3.connect(node.path).execute("SELECT seq, hash, signature FROM entries WHERE seq = 6").fetchone()
    head = SignedHead(ledger_id=db.genesis.ledger_id, seq=row[0], hash=row[1], signature=row[2])
    middle = node.folder / "middle.jsonl"
    middle.write_bytes(b"".join([*lines[:7], head.line + b"\n"]))
    node.restore()
    result = node.recover(evidence=middle)
    assert (result.proven, result.regained) == (False, 2)
    assert node.audit(receipts=node.lost).findings == []
    assert node.open().epsilon_spent == pytest.approx(8.0)


def test_evidence_of_another_ledger_or_altered_evidence_changes_nothing(node):
    node.restore()
    other = Ledger.create(node.folder / "other.db", genesis(key=STRANGER), STRANGER)
    spend(other, 9, sigma=20.0)
    foreign = export_of(other, node.folder / "foreign.jsonl")
    lines = node.long.read_bytes().splitlines(keepends=True)
    altered = node.folder / "altered.jsonl"
    altered.write_bytes(b"".join([*lines[:7], *lines[8:]]))
    before = node.path.read_bytes()
    seen = node.witness.read()
    for evidence, words in (
        (foreign, "another ledger"),
        (altered, "does not hold"),
        (node.folder / "none", "cannot be read"),
    ):
        with pytest.raises(BadInputError, match=words):
            node.recover(evidence=evidence)
    assert node.path.read_bytes() == before
    assert node.witness.read() == seen


def test_evidence_of_a_fork_is_refused(node):
    """The copy went another way than the export: the same key signed both, so both cannot be the history."""
    node.restore()
    copy = node.folder / "fork" / "ledger.db"
    copy.parent.mkdir()
    shutil.copy(node.backup, copy)
    recover(copy, KEY, witness=Witness(copy.parent / "witness"), machine=MACHINE)
    with pytest.raises(BadInputError, match="another history"):
        recover(copy, KEY, witness=Witness(copy.parent / "witness"), machine=MACHINE, evidence=node.long)


def test_a_lost_witness_costs_all_that_is_left(node):
    node.witness.path.unlink()
    with pytest.raises(BadInputError, match="is missing"):
        node.open()
    assert not node.recover().proven
    assert node.open().epsilon_spent == pytest.approx(8.0)
    audit = node.audit(witness=node.witness.read(), receipts=node.lost)
    assert (audit.findings, audit.unproven) == ([], True)


def test_a_witness_of_another_ledger_or_history_proves_nothing(node):
    other = Ledger.create(node.folder / "other.db", genesis(key=STRANGER), STRANGER)
    node.witness.mirror(lambda: other.head)
    assert not node.recover().proven
    assert node.open().epsilon_spent == pytest.approx(8.0)


def test_a_move_to_another_machine_is_proven_by_the_witness(node):
    moved = node.folder / "moved.db"
    shutil.copy(node.path, moved)
    with pytest.raises(BadInputError, match="another machine"):
        node.open(machine="new")
    result = recover(moved, KEY, witness=node.witness, machine="new")
    assert (result.proven, result.charged, result.regained) == (True, 0, 0)
    ledger = Ledger(moved, KEY, witness=node.witness, machine="new")
    assert ledger.epsilon_spent == node.spent
    spend(ledger, 1, sigma=20.0)
    with pytest.raises(BadInputError, match="older copy"):  # the copy left behind cannot be spent
        node.open()
    with pytest.raises(BadInputError, match="another machine"):
        Ledger(moved, KEY, witness=node.witness, machine=MACHINE)
    audit = audit_history(LedgerFile(moved), witness=node.witness.read(), receipts=node.lost)
    assert (audit.findings, audit.restored, audit.unproven) == ([], 1, False)


def test_open_plans_are_closed_and_pending_charges_abandoned(node):
    ledger = node.open()
    planned = request(10, sigma=20.0, plan_hash="b" * 64)
    ledger.admit(planned, 5)
    ledger.reserve(planned, b"1" * 32)
    assert ledger.units_set_aside > 0
    spent = ledger.epsilon_spent
    ledger.close()
    assert node.recover(machine="new").proven
    ledger = node.open(machine="new")
    assert (ledger.units_set_aside, ledger.epsilon_spent) == (0, spent)
    with pytest.raises(PlanClosedError):
        ledger.admit(planned, 5)
    with pytest.raises(ChargeAbandonedError):  # no other machine computes the very same output
        ledger.reserve(planned, b"2" * 32)
    assert node.audit().findings == []
    assert b"1" * 32 not in node.path.read_bytes()


def test_a_copy_is_recovered_with_the_ledgers_key_only(node):
    before = node.path.read_bytes()
    with pytest.raises(BadInputError, match="another key"):
        node.recover(key=STRANGER)
    assert node.path.read_bytes() == before
    edit(node.path, "UPDATE entries SET body = replace(body, 'delta', 'loss!') WHERE seq = 3")
    with pytest.raises(BadInputError, match="entry 3 was altered"):
        node.recover()
    with pytest.raises(BadInputError, match="no such file"):
        recover(node.folder / "missing.db", KEY, witness=node.witness, machine=MACHINE)


def test_evidence_may_have_come_to_another_key(node):
    ledger = node.open()
    ledger.rotate_key(NEW_KEY)
    spend(ledger, 1, sigma=20.0)
    rotated = export_of(ledger, node.folder / "rotated.jsonl")
    ledger.close()
    node.restore()
    result = node.recover(key=NEW_KEY, evidence=rotated)
    assert (result.proven, result.regained) == (True, 7)
    ledger = node.open(key=NEW_KEY)
    spend(ledger, 1, sigma=20.0)
    audit = node.audit(witness=node.witness.read(), receipts=node.lost)
    assert (audit.findings, audit.rotations) == ([], 1)


def test_recovery_in_a_simulation_after_training_without_privacy_charges_nothing(tmp_path):
    witness = Witness(tmp_path / "witness")
    ledger = new_ledger(tmp_path, witness=witness)
    spend(ledger, 1, sigma=None)
    ledger.close()
    witness.path.unlink()
    result = recover(tmp_path / "ledger.db", KEY, witness=witness, machine=MACHINE)
    assert (result.proven, result.charged) == (False, 0)
    assert audit_history(LedgerFile(tmp_path / "ledger.db")).findings == []
