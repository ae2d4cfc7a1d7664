"""Histories to tamper with: what a key's owner could write by hand, and a ledger that has lived through everything."""

from __future__ import annotations

import shutil
import sqlite3
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from ledger_samples import KEY, MACHINE, Lines, genesis, request

from conclave.base.canonical import canonical_json, sha256
from conclave.privacy.accounting.prices import charge_units
from conclave.privacy.ledger import ChargeAbandonedError, ChargeRequest, Entry, Genesis, KeyRotation, Ledger, SignedHead
from conclave.privacy.ledger.entry import add_units
from conclave.privacy.ledger.genesis import FORMAT_VERSION
from conclave.privacy.ledger.reading.history import open_history, write_export
from conclave.privacy.ledger.reading.verification import LedgerAudit, audit_history
from conclave.privacy.ledger.upkeep.recovery import recover
from conclave.privacy.ledger.witness import Witness

NEW_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
STRANGER = Ed25519PrivateKey.from_private_bytes(bytes(range(2, 34)))


def price_of(item: ChargeRequest, of: Genesis) -> str:
    return str(charge_units(item.mechanism, float(of.order)))


@dataclass
class RawLines:
    """A history in memory, of any bytes."""

    genesis: Genesis
    raw: list[bytes]
    head: SignedHead

    def lines(self):
        return iter(self.raw)


def sealed(of: Genesis, raw: list[bytes], key: Ed25519PrivateKey = KEY) -> RawLines:
    """Vouch for any bytes, as a careless or malicious owner could."""
    last = sha256(raw[-1]) if raw else of.hash
    return RawLines(of, raw, SignedHead.sign(key, of.ledger_id, len(raw), last))


def rehash(of: Genesis, entries: list[Entry]) -> list[Entry]:
    """Recompute the whole chain, as a careful forger would."""
    prev, out = of.hash, []
    for entry in entries:
        out.append(replace(entry, prev_hash=prev))
        prev = out[-1].hash
    return out


@dataclass
class Forger:
    """Writes any history with numbers, chain, totals and head in order: what the owner of the key could write."""

    genesis: Genesis = field(default_factory=genesis)
    key: Ed25519PrivateKey = KEY
    entries: list[Entry] = field(default_factory=list)

    def add(self, state: str, charge_id: str, mechanism: str, charge: str = "0", **fields) -> Forger:
        last = self.entries[-1] if self.entries else None
        values = {
            "version": FORMAT_VERSION,
            "ledger_id": self.genesis.ledger_id,
            "seq": len(self.entries) + 1,
            "prev_hash": last.hash if last else self.genesis.hash,
            "charge_id": charge_id,
            "state": state,
            "mechanism_text": mechanism,
            "rdp_charge": charge,
            "rdp_total": add_units(last.rdp_total if last else "0", charge),
            "rdp_budget": self.genesis.rdp_budget,
            "run_id": "7",
            "round": 0,
            "plan_hash": "",
            "code_hash": "",
            "model_in_hash": "",
            "output_hash": "",
            "releases": "[]",
            "rng": "",
            "time": self.genesis.time,
        }
        self.entries.append(Entry(**(values | fields)))
        return self

    def charge(self, item: ChargeRequest, state: str = "RESERVED", **fields) -> Forger:
        values = {
            "charge": price_of(item, self.genesis) if state == "RESERVED" else "0",
            "run_id": item.run_id,
            "round": item.round,
            "plan_hash": item.plan_hash,
            "code_hash": item.code_hash,
            "model_in_hash": item.model_in_hash,
            "output_hash": "0" * 64 if state == "COMMITTED" else "",
            "releases": item.releases_json(),
            "rng": item.rng,
            "mechanism": item.mechanism_json(),
            "charge_id": item.charge_id(self.genesis.ledger_id),
        }
        return self.add(state, **(values | fields))

    def admit(self, item: ChargeRequest, charges: int, units: object = None) -> Forger:
        if units is None:
            units = str(int(price_of(item, self.genesis)) * charges)
        document = {"kind": "plan", "charges": charges, "mechanism": item.mechanism_json(), "units": units}
        name = f"plan {item.run_id} {item.plan_hash} {len(self.entries)}"
        return self.add(
            "ADMITTED", sha256(name.encode()), canonical_json(document).decode(), run_id=item.run_id,
            plan_hash=item.plan_hash,
        )  # fmt: skip

    def close(self, item: ChargeRequest) -> Forger:
        name = f"plan {item.run_id} {item.plan_hash}".encode()
        return self.add(
            "CLOSED", sha256(name), '{"kind":"plan-end"}', run_id=item.run_id, plan_hash=item.plan_hash
        )  # fmt: skip

    def rotate(self, new_key: Ed25519PrivateKey, **changes) -> Forger:
        rotation = KeyRotation.sign(self.genesis.ledger_id, self.key, new_key).model_dump() | changes
        self.key = new_key
        return self.add("ROTATED", sha256(rotation["new_key"].encode()), _json({"kind": "key-rotation", **rotation}))

    def restore(self, *, proven: bool, charge: str = "0") -> Forger:
        document = {"kind": "restore", "machine": MACHINE, "proven": proven}
        return self.add("RESTORED", sha256(f"restored {len(self.entries)}".encode()), _json(document), charge)

    @property
    def left(self) -> str:
        return str(int(self.genesis.rdp_budget) - int(self.entries[-1].rdp_total))

    @property
    def head(self) -> SignedHead:
        last = self.entries[-1].hash if self.entries else self.genesis.hash
        return SignedHead.sign(self.key, self.genesis.ledger_id, len(self.entries), last)

    def history(self) -> Lines:
        return Lines(self.genesis, self.entries, key=self.key)

    def audit(self, **options) -> LedgerAudit:
        return audit_history(self.history(), **options)


def _json(document: dict[str, object]) -> str:
    return canonical_json(document).decode()


@dataclass
class LongLife:
    """A ledger of 100 entries: plans, charges, one given up, another key, a move to another machine.

    heads: the signed head after each change, by position.
    """

    path: Path
    export: Path
    witness: Witness
    heads: dict[int, SignedHead]
    key: Ed25519PrivateKey = NEW_KEY
    machine: str = "another"

    def open(self, **options) -> Ledger:
        return Ledger(self.path, self.key, **({"witness": self.witness, "machine": self.machine} | options))


def long_life(folder: Path, dataset: str = "test") -> LongLife:
    witness = Witness(folder / "witness" / "head.json")
    path, export = folder / "ledger.db", folder / "ledger.jsonl"
    ledger = Ledger.create(path, replace(genesis(), dataset_id=dataset), KEY, witness=witness)
    life = LongLife(path, export, witness, {0: ledger.head})
    numbers = iter(range(1, 1000))

    def spend(count: int, plan: str) -> None:
        for _ in range(count):
            item = request(next(numbers), sigma=20.0, plan_hash=plan)
            reservation = ledger.reserve(item, bytes(32))
            life.heads[ledger.head.seq] = ledger.head
            receipt = ledger.commit(reservation, b"reply").receipt
            life.heads[receipt.seq] = receipt

    ledger.admit(request(sigma=20.0, plan_hash="a" * 64), 20)  # 1
    spend(20, "a" * 64)  # 41
    ledger.rotate_key(NEW_KEY)  # 42
    ledger.admit(request(sigma=20.0, plan_hash="b" * 64), 20)  # 43
    spend(10, "b" * 64)  # 63
    given_up = request(next(numbers), sigma=20.0, plan_hash="b" * 64)
    ledger.reserve(given_up, bytes(32))
    ledger.reserve(given_up, bytes(32))
    with pytest.raises(ChargeAbandonedError):
        ledger.reserve(given_up, bytes(32))  # 65
    ledger.close_plans("7")  # 67
    ledger.close()
    assert recover(path, NEW_KEY, witness=witness, machine=life.machine).proven  # 68
    ledger = life.open()
    spend(16, "")  # 100
    life.heads[100] = ledger.head
    ledger.close()
    assert ledger_length(path) == 100
    with export.open("wb") as out:
        assert write_export(open_history(path), out) == 100
    return life


def copy_of(life: LongLife, folder: Path) -> LongLife:
    """The same ledger, witness and export in another folder."""
    folder.mkdir(parents=True, exist_ok=True)
    witness = Witness(folder / "witness" / "head.json")
    witness.path.parent.mkdir()
    for source, target in (
        (life.path, folder / "ledger.db"), (life.export, folder / "ledger.jsonl"), (life.witness.path, witness.path)
    ):  # fmt: skip
        shutil.copy(source, target)
    return replace(life, path=folder / "ledger.db", export=folder / "ledger.jsonl", witness=witness)


def edit(path: Path, *statements: str, keep_triggers: bool = True) -> None:
    """Change a ledger file by hand, as somebody without the key could: the triggers are only in the way."""
    db = sqlite3.connect(path)
    triggers = db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
    for name, _ in triggers:
        db.execute(f"DROP TRIGGER {name}")
    for statement in statements:
        db.execute(statement)
    for _, sql in triggers if keep_triggers else ():
        db.execute(sql)
    db.commit()
    db.close()


def ledger_length(path: Path) -> int:
    return sum(1 for _ in open_history(path).lines())
