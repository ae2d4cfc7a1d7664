"""What the ledger file keeps beside its entries for speed, computed from the entries alone."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass, field

from conclave.base.canonical import canonical_json
from conclave.privacy.ledger.entry import INFINITE
from conclave.privacy.ledger.heads import KeyRotation
from conclave.privacy.ledger.mechanism_text import Restored, parse_plan, parse_rotation

_RESERVED = '"state":"RESERVED"'
_NOTHING_DERIVES_FROM = ('"state":"COMMITTED"', '"state":"ABANDONED"', '"state":"MIGRATED"')


@dataclass
class Derived:
    """The plans' budgets and the ledger's standing, after the entries taken so far.

    plans: (run, plan hash) → units set aside, units drawn, open.
    """

    plans: dict[tuple[str, str], tuple[int, int, bool]] = field(default_factory=dict)
    rotations: list[KeyRotation] = field(default_factory=list)
    machine: str | None = None

    def take(self, body: str) -> None:
        """Follow one entry.

        Raises:
            ValueError, KeyError, TypeError: no ledger writes such an entry.
        """
        # An entry's own text cannot spell this: within a string, quotes are escaped.
        if any(state in body for state in _NOTHING_DERIVES_FROM) or (not self.plans and _RESERVED in body):
            return
        entry = json.loads(body)
        state, plan = entry["state"], (entry["run_id"], entry["plan_hash"])
        if state == "RESERVED":
            set_aside, drawn, is_open = self.plans.get(plan, (0, 0, False))
            if is_open and entry["rdp_charge"] != INFINITE:
                self.plans[plan] = (set_aside, drawn + int(entry["rdp_charge"]), True)
        elif state == "ADMITTED":
            self.plans[plan] = (parse_plan(entry["mechanism"]).units, 0, True)
        elif state == "CLOSED":
            self.plans[plan] = (*self.plans[plan][:2], False)
        elif state == "ROTATED":
            self.rotations.append(parse_rotation(entry["mechanism"]))
        elif state == "RESTORED":
            self.machine = Restored.parse(entry["mechanism"]).machine
            self.plans = {name: (*value[:2], False) for name, value in self.plans.items()}

    def store(self, db: sqlite3.Connection) -> None:
        """Make the file's tables say this, inside the open transaction; if they already do, write nothing."""
        plans = {(*name, str(aside), str(drawn), int(is_open)) for name, (aside, drawn, is_open) in self.plans.items()}
        if set(db.execute("SELECT run_id, plan_hash, set_aside, drawn, open FROM plans")) != plans:
            db.execute("DELETE FROM plans")
            db.executemany("INSERT INTO plans VALUES (?, ?, ?, ?, ?)", sorted(plans))
        standing = set()
        if self.rotations:
            rotations = canonical_json([rotation.model_dump() for rotation in self.rotations])
            standing.add(("rotations", rotations.decode()))
        if self.machine is not None:
            standing.add(("machine", self.machine))
        if set(db.execute("SELECT name, value FROM standing")) != standing:
            db.execute("DELETE FROM standing")
            db.executemany("INSERT INTO standing VALUES (?, ?)", sorted(standing))


def rebuild(db: sqlite3.Connection) -> None:
    """Recompute the plans' budgets and the ledger's standing from the entries, inside the open transaction."""
    derived = Derived()
    for (body,) in db.execute("SELECT body FROM entries ORDER BY seq"):
        derived.take(body)
    derived.store(db)
