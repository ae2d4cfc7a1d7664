"""What one run has drawn from a ledger so far, by round and by plan. Read from the entries alone."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

from conclave.base.canonical import canonical_json
from conclave.privacy.ledger.entry import ChargeRequest, charge_id_of
from conclave.privacy.ledger.mechanism_text import parse_plan


class _Charge(NamedTuple):
    charge_id: str
    plan_hash: str
    model_in_hash: str


@dataclass
class Drawn:
    """The charges of one run, followed from entry to entry.

    last: number of the last entry that was looked at.
    """

    ledger_id: str
    run_id: str
    last: int = 0
    _rounds: dict[int, list[_Charge]] = field(default_factory=lambda: defaultdict(list))
    _abandoned: set[str] = field(default_factory=set)
    _charges: Counter[tuple[str, str]] = field(default_factory=Counter)
    _most: dict[str, Counter[str]] = field(default_factory=dict)

    def catch_up(self, db: sqlite3.Connection) -> None:
        """Read what was appended since; call it inside the transaction that appends."""
        # An entry's own text cannot spell this: within a string, quotes are escaped.
        named = f'"run_id":{canonical_json(self.run_id).decode()}'
        rows = db.execute("SELECT body FROM entries WHERE seq > ? AND instr(body, ?) ORDER BY seq", (self.last, named))
        for (body,) in rows:
            self._take(json.loads(body))
        (last,) = db.execute("SELECT coalesce(max(seq), 0) FROM entries").fetchone()
        self.last = int(last)

    def _take(self, entry: dict[str, str | int]) -> None:
        plan_hash, mechanism = str(entry["plan_hash"]), str(entry["mechanism"])
        if entry["state"] == "ADMITTED":
            self._most[plan_hash] = parse_plan(mechanism).most
        elif entry["state"] == "ABANDONED":
            self._abandoned.add(str(entry["charge_id"]))
        elif entry["state"] == "RESERVED":
            charge = _Charge(str(entry["charge_id"]), plan_hash, str(entry["model_in_hash"]))
            self._rounds[int(entry["round"])].append(charge)
            self._charges[plan_hash, mechanism] += 1

    def has_charged(self, request: ChargeRequest) -> bool:
        """Whether the run has a charge of this kind in this round, of any plan or model, that was not abandoned.

        What was abandoned released nothing. Entries do not state their kind, but are named by its hash.
        """
        return any(
            charge.charge_id not in self._abandoned and charge.charge_id == self._named(request, charge)
            for charge in self._rounds.get(request.round, ())
        )

    def is_left(self, request: ChargeRequest) -> bool:
        """Whether the plan was admitted with more such charges than it drew; abandoned ones are spent."""
        mechanism = request.mechanism_json()
        most = self._most[request.plan_hash][mechanism] if request.plan_hash in self._most else 0
        return self._charges[request.plan_hash, mechanism] < most

    def _named(self, request: ChargeRequest, charge: _Charge) -> str:
        return charge_id_of(
            request.kind,
            ledger_id=self.ledger_id,
            run_id=self.run_id,
            round_number=request.round,
            plan_hash=charge.plan_hash,
            model_in_hash=charge.model_in_hash,
        )
