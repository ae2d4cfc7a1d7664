"""The held-out side of a node: units that never train, and the ledger that pays for measuring on them."""

from __future__ import annotations

from dataclasses import dataclass

from data.held_out import split
from data.sources import Records
from privacy.ledger import Genesis, Ledger


@dataclass(frozen=True)
class HeldOut:
    """Records that are evaluated on, and their own ledger."""

    records: Records
    ledger: Ledger


def sides_of(records: Records, genesis: Genesis) -> tuple[Records, Records]:
    """Divide a node's records as its training ledger fixes it: those that train, and those that are held out."""
    return split(records, unit=genesis.unit, key=bytes.fromhex(genesis.split_key), share=float(genesis.held_out))
