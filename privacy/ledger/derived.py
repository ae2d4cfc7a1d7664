"""What the ledger file keeps beside its entries for speed, computed from the entries alone."""

from __future__ import annotations

import json
import sqlite3

from privacy.canonical import canonical_json
from privacy.ledger.entry import INFINITE, Entry


def rebuild(db: sqlite3.Connection) -> None:
    """Recompute the plans' budgets and the ledger's standing from the entries, inside the open transaction."""
    plans: dict[tuple[str, str], tuple[int, int, bool]] = {}
    rotations: list[object] = []
    machine: str | None = None
    for (body,) in db.execute("SELECT body FROM entries ORDER BY seq"):
        entry = Entry.parse(body)
        plan = (entry.run_id, entry.plan_hash)
        if entry.state == "ADMITTED":
            plans[plan] = (int(json.loads(entry.mechanism)["units"]), 0, True)
        elif entry.state == "RESERVED" and entry.rdp_charge != INFINITE and plan in plans and plans[plan][2]:
            set_aside, drawn, _ = plans[plan]
            plans[plan] = (set_aside, drawn + int(entry.rdp_charge), True)
        elif entry.state == "CLOSED":
            plans[plan] = (*plans[plan][:2], False)
        elif entry.state == "ROTATED":
            rotations.append({k: v for k, v in json.loads(entry.mechanism).items() if k != "kind"})
        elif entry.state == "RESTORED":
            machine = json.loads(entry.mechanism)["machine"]
            plans = {name: (*value[:2], False) for name, value in plans.items()}
    db.execute("DELETE FROM plans")
    db.executemany(
        "INSERT INTO plans VALUES (?, ?, ?, ?, ?)",
        [(*name, str(aside), str(drawn), int(is_open)) for name, (aside, drawn, is_open) in plans.items()],
    )
    db.execute("DELETE FROM standing")
    if rotations:
        db.execute("INSERT INTO standing VALUES ('rotations', ?)", (canonical_json(rotations).decode(),))
    if machine is not None:
        db.execute("INSERT INTO standing VALUES ('machine', ?)", (machine,))
