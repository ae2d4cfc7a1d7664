"""Ledgers whose owner lied from the first entry on: all else agrees with the lie, receipts and signatures included."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from conclave.base.canonical import canonical_json
from conclave.privacy.accounting.prices import charge_units
from conclave.privacy.ledger import Entry, Genesis, SignedHead
from conclave.privacy.ledger.entry import INFINITE, add_units, charge_id_of
from conclave.privacy.ledger.reading.history import LedgerFile, write_export
from conclave.privacy.randomness import derive
from conclave.server.run_directory import RunDirectory

CHARGE_STATES = ("RESERVED", "COMMITTED", "ABANDONED")
Change = Callable[[Entry], Entry | list[Entry]]


@dataclass
class Told:
    """A history as its owner tells it."""

    genesis: Genesis
    entries: list[Entry]
    head: SignedHead

    def lines(self):
        return iter([entry.line for entry in self.entries])


def copy_to_lie_in(run: RunDirectory, folder: Path) -> RunDirectory:
    """Copy what an audit reads of a run."""
    unread = shutil.ignore_patterns("checkpoint", "model", "report*")
    return RunDirectory(Path(shutil.copytree(run.path, folder / "run", ignore=unread)))


def kind_of(entry: Entry) -> str:
    return {'["choice"]': "choose", '["metrics"]': "evaluate"}.get(entry.releases, "train")


def key_of(seed: int, number: int, side: str) -> Ed25519PrivateKey:
    root = derive(seed.to_bytes(32, "big"), "simulated node", number)
    return Ed25519PrivateKey.from_private_bytes(derive(root, "ledger key" if side == "training" else "held-out key"))


def exported(run: RunDirectory) -> list[Path]:
    """Turn the run's ledgers into exports; return where they lie, training first."""
    found = []
    for path in (*run.ledgers, *run.held_out_ledgers):
        with path.with_suffix(".jsonl").open("wb") as stream:
            write_export(LedgerFile(path), stream)
        path.unlink()
        found.append(path.with_suffix(".jsonl"))
    return found


def lie(run: RunDirectory, path: Path, change: Change, **constants: str) -> None:
    """Write an export anew as if its owner had lied from the start, and the server had kept what came of it.

    A changed mechanism is charged what it costs. Unless ``change`` names charges itself, they are named as a node does.

    Args:
        change: entry → what stands in its place.
        constants: of the genesis.
    """
    first, *lines, _ = path.read_bytes().splitlines()
    genesis = replace(Genesis.parse(first), **constants)
    key = key_of(run.scenario.seed, int(path.stem.removeprefix("node-")), genesis.side)
    previous, total, told, became = genesis.hash, "0", [], {}
    for line in lines:
        before = Entry.parse(line)
        changed = change(before)
        for entry in changed if isinstance(changed, list) else [changed]:
            after = replace(_charged(before, entry, genesis), seq=len(told) + 1, prev_hash=previous)
            total = add_units(total, after.rdp_charge)
            after = replace(after, rdp_total=total)
            previous = after.hash
            told.append(after)
            if before.state == "COMMITTED":
                became.setdefault(before.charge_id, after)
    with path.open("wb") as stream:
        write_export(Told(genesis, told, SignedHead.sign(key, genesis.ledger_id, len(told), previous)), stream)
    kept = [json.loads(line) for line in run.receipts.read_text().splitlines()]
    for receipt in kept:
        after = became.get(receipt["charge_id"])
        if after is not None:
            head = SignedHead.sign(key, genesis.ledger_id, after.seq, after.hash)
            receipt |= {"charge_id": after.charge_id, "receipt": head.model_dump()}
    run.receipts.write_text("".join(json.dumps(receipt) + "\n" for receipt in kept))


def _charged(before: Entry, entry: Entry, genesis: Genesis) -> Entry:
    """Name and price a charge as a node would."""
    if entry.state not in CHARGE_STATES:
        return entry
    if entry.charge_id == before.charge_id:
        entry = renamed(entry, kind_of(before), genesis.ledger_id)
    respelled = entry.mechanism_text != before.mechanism_text
    if before.state == "RESERVED" and respelled and entry.rdp_charge == before.rdp_charge:
        mechanism = entry.mechanism
        price = INFINITE if mechanism is None else str(charge_units(mechanism, float(genesis.order)))
        entry = replace(entry, rdp_charge=price)
    return entry


def renamed(entry: Entry, kind: str, ledger_id: str | None = None) -> Entry:
    """Give a charge the name that belongs to its content."""
    name = charge_id_of(
        kind,
        ledger_id=ledger_id or entry.ledger_id,
        run_id=entry.run_id,
        round_number=entry.round,
        plan_hash=entry.plan_hash,
        model_in_hash=entry.model_in_hash,
    )
    return replace(entry, charge_id=name)


def stating(kind: str, **fields: object) -> Change:
    """Lie about the mechanism of every charge of a kind, in the plan's admission too; None leaves a field out."""

    def respell(text: str) -> str:
        document = json.loads(text)
        for name, value in fields.items():
            if value is None:
                document.pop(name, None)
            elif callable(value):
                document[name] = value(document[name])
            else:
                document[name] = value
        return canonical_json(document).decode()

    def change(entry: Entry) -> Entry:
        if entry.state in CHARGE_STATES and kind_of(entry) == kind:
            return replace(entry, mechanism_text=respell(entry.mechanism_text))
        if entry.state != "ADMITTED":
            return entry
        document = json.loads(entry.mechanism_text)
        item = document["also"][0] if kind == "choose" else document
        item["mechanism"] = respell(item["mechanism"])
        return replace(entry, mechanism_text=canonical_json(document).decode())

    return change


def times(factor: float) -> Callable[[str], str]:
    """Multiply a decimal."""
    return lambda text: repr(float(text) * factor)
