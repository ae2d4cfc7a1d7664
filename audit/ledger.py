"""Audit of ledgers given as files: what ``conclave audit ledger`` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from conclave.base.errors import BadInputError
from conclave.privacy.ledger.reading.history import open_history
from conclave.privacy.ledger.reading.verification import LedgerAudit, audit_history
from conclave.privacy.ledger.witness import Witness
from conclave.server.replies.receipts import read_receipts


@dataclass
class LedgersAudit:
    """The audits of several ledgers, by file. NOT_REFUTED is as much as an audit can say."""

    verdict: Literal["VIOLATED", "NOT_REFUTED"]
    ledgers: dict[str, LedgerAudit]


def audit_ledgers(given: Sequence[Path], *, witness: Path | None = None, receipts: Path | None = None) -> LedgersAudit:
    """Audit ledger files, exports, and those in folders.

    Args:
        witness: that of the ledger, if a single one is given.
        receipts: a run's ``receipts.jsonl``; receipts of other ledgers are ignored.

    Raises:
        BadInputError: a file cannot be read, a folder holds no ledger, or a witness is given for several.
    """
    files = _ledger_files(given)
    if witness is not None and len(files) != 1:
        raise BadInputError(f"--witness: belongs to one ledger, {len(files)} are given")
    head = None if witness is None else Witness(witness).read()
    if witness is not None and head is None:
        raise BadInputError(f"{witness}: no such file, must be a ledger's witness")
    kept = [] if receipts is None else [item.receipt for item in read_receipts(receipts)]
    results = {}
    for path in files:
        history = open_history(path)
        own = [receipt for receipt in kept if receipt.ledger_id == history.genesis.ledger_id]
        results[str(path)] = audit_history(history, witness=head, receipts=own)
    violated = any(result.findings for result in results.values())
    return LedgersAudit("VIOLATED" if violated else "NOT_REFUTED", results)


def _ledger_files(given: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in given:
        if path.is_dir():
            next(path.iterdir(), None)  # a folder that may not be read would look like one without ledgers
        found = sorted(path.rglob("*.db")) if path.is_dir() else [path]
        if not found:
            raise BadInputError(f"{path}: holds no ledger (*.db), must be a ledger or a folder with ledgers")
        files += found
    return files
