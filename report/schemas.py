"""The JSON Schemas of the documents that Conclave writes for others to read."""

from __future__ import annotations

import math
from typing import Any

from pydantic import TypeAdapter

from conclave.audit.ledger import LedgersAudit
from conclave.audit.run import RunAudit
from conclave.base.errors import BadInputError
from conclave.privacy.ledger.entry import Entry
from conclave.privacy.ledger.genesis import Genesis
from conclave.privacy.ledger.heads import SignedHead
from conclave.privacy.ledger.upkeep.recovery import Recovery
from conclave.report.budget import BudgetReport
from conclave.report.model_card import ModelCard
from conclave.server.replies.receipts import KeptReceipt

SCHEMAS: dict[str, type] = {
    "audit-ledger": LedgersAudit,
    "audit-run": RunAudit,
    "model": ModelCard,
    "node-budget": BudgetReport,
    "node-restore": Recovery,
    "ledger-genesis": Genesis,
    "ledger-entry": Entry,
    "ledger-head": SignedHead,
    "receipt": KeptReceipt,
}
"""Name → what it describes. The command that prints one is named like it; an export holds one genesis line, entry lines
and one head line."""


def schema_of(name: str) -> dict[str, Any]:
    """Return a schema (JSON Schema 2020-12).

    Raises:
        BadInputError: no document has this name.
    """
    if name not in SCHEMAS:
        raise BadInputError(f"schema {name}: must be one of {', '.join(SCHEMAS)}")
    document = TypeAdapter(SCHEMAS[name]).json_schema(mode="serialization")
    _allow_infinity(document)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **document, "title": name}


def to_json(document: object) -> Any:
    """Return a document as plain JSON values. Infinity, which JSON lacks, is the string ``inf``, as in the ledger."""
    return _spell_infinity(TypeAdapter(type(document)).dump_python(document, mode="python"))


def _spell_infinity(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _spell_infinity(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_spell_infinity(item) for item in value]
    return "inf" if isinstance(value, float) and math.isinf(value) else value


def _allow_infinity(node: Any) -> None:
    """Let every number also be ``inf``, in place."""
    if isinstance(node, dict):
        if node.get("type") == "number":
            del node["type"]
            node["anyOf"] = [{"type": "number"}, {"const": "inf"}]
            return
        for child in node.values():
            _allow_infinity(child)
    elif isinstance(node, list):
        for child in node:
            _allow_infinity(child)
