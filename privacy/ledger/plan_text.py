"""How a ledger spells what a plan may draw: canonical JSON in the entry that admits it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from conclave.base.canonical import canonical_json, sha256

PlannedMechanism = tuple[str, int]
"""The spelling of a mechanism, and how many charges of it."""


def plan_id_of(ledger_id: str, run_id: str, plan_hash: str) -> str:
    """Return what stands for the charge id in the entries that admit and close a plan."""
    return sha256(canonical_json(["plan", ledger_id, run_id, plan_hash]))


def spell_plan(planned: Sequence[PlannedMechanism], units: str) -> str:
    """Return the JSON of an admission.

    Args:
        planned: at least one; the first is what every round is charged as.
        units: RDP units set aside for all of it.
    """
    (mechanism, charges), *also = planned
    document: dict[str, object] = {"kind": "plan", "charges": charges, "mechanism": mechanism, "units": units}
    if also:
        document["also"] = [{"charges": count, "mechanism": other} for other, count in also]
    return canonical_json(document).decode()


def parse_plan(text: str) -> tuple[int, list[PlannedMechanism]]:
    """Return the units that an admission sets aside, and what its plan may draw.

    Raises:
        ValueError, KeyError, TypeError: no ledger writes such an admission.
    """
    document = json.loads(text)
    items = [document, *document.get("also", ())]
    planned = [(str(item["mechanism"]), int(item["charges"])) for item in items]
    units = int(document["units"])
    if units < 0 or any(count < 0 for _, count in planned):
        raise ValueError("less than nothing")
    return units, planned


def most_charges(planned: Sequence[PlannedMechanism]) -> dict[str, int]:
    """Return how many charges of each mechanism a plan may draw."""
    most: dict[str, int] = {}
    for mechanism, count in planned:
        most[mechanism] = most.get(mechanism, 0) + count
    return most
