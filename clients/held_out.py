"""The held-out side of a node: units that never train, and the ledger that pays for measuring on them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from conclave.data.held_out import by_content, by_group, split
from conclave.model.records import Records
from conclave.privacy.ledger import Genesis, Ledger


@dataclass(frozen=True)
class HeldOut:
    """Records that are evaluated on, and their own ledger."""

    records: Records
    ledger: Ledger


def sides_of(records: Records, genesis: Genesis, identities: Iterable[bytes] | None) -> tuple[Records, Records]:
    """Divide a node's records as its training ledger fixes it: those that train, and those that are held out.

    Args:
        identities: what each record is known by, of no account where groups are the unit; None where records are known
            by their content, as in a simulation.
    """
    if genesis.unit == "group":
        identities = by_group(records)
    elif identities is None:
        identities = by_content(records)
    return split(records, identities, key=bytes.fromhex(genesis.split_key), share=float(genesis.held_out))
