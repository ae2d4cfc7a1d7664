"""What a ledger records: charges, and the other entries of its history, and how they are hashed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Literal

from pydantic import Field

from conclave.base.canonical import canonical_json, sha256
from conclave.base.errors import BadInputError
from conclave.privacy.accounting.mechanisms import Mechanism
from conclave.privacy.ledger.genesis import Hashed
from conclave.privacy.ledger.mechanism_text import check_named, parse, spell

INFINITE = "inf"

State = Literal["RESERVED", "COMMITTED", "ABANDONED", "ADMITTED", "CLOSED", "ROTATED", "RESTORED", "MIGRATED"]
"""RESERVED → COMMITTED | ABANDONED is the life of a charge, ADMITTED → CLOSED of the budget set aside for a plan. The
other three are about the ledger itself: a new key, a start from a restored copy, a newer format."""


def charge_id_of(
    kind: str, *, ledger_id: str, run_id: str, round_number: int, plan_hash: str, model_in_hash: str
) -> str:
    """Identify a charge by its whole content, so other content is another charge; whoever asks can compute it."""
    return sha256(canonical_json([run_id, round_number, ledger_id, plan_hash, model_in_hash, kind]))


def plan_id_of(ledger_id: str, run_id: str, plan_hash: str) -> str:
    """Return what stands for the charge id in the entries that admit and close a plan."""
    return sha256(canonical_json(["plan", ledger_id, run_id, plan_hash]))


@dataclass(frozen=True, kw_only=True)
class ChargeRequest:
    """What a node is about to spend, and on what. Nothing here derives from private data.

    mechanism: None is training without privacy, charged ε = ∞ (simulation only).
    parts: σ of each release by name, if several are made from one Poisson sample: they are one charge.
    kind: what is released, for instance ``train``.
    numeric: ``strict`` or ``fast``, where the clip bound holds for what was summed; ``uncertified`` otherwise.
    rng: ``os-entropy``, or ``seeded`` in simulation.
    """

    kind: str
    run_id: str
    round: int
    plan_hash: str
    model_in_hash: str
    code_hash: str
    mechanism: Mechanism | None
    clip: float
    releases: tuple[str, ...]
    numeric: Literal["strict", "fast", "uncertified"]
    rng: Literal["os-entropy", "seeded"]
    parts: tuple[tuple[str, float], ...] = ()

    def charge_id(self, ledger_id: str) -> str:
        """Identify the charge in a ledger; see :func:`charge_id_of`."""
        return charge_id_of(
            self.kind,
            ledger_id=ledger_id,
            run_id=self.run_id,
            round_number=self.round,
            plan_hash=self.plan_hash,
            model_in_hash=self.model_in_hash,
        )

    def mechanism_json(self) -> str:
        """Spell the mechanism as canonical JSON, enough to recompute its cost.

        Raises:
            BadInputError: several releases, and not each with a σ among the parts; or less noise than is charged.
        """
        check_named(self.mechanism, self.releases, dict(self.parts))
        return spell(self.mechanism, clip=self.clip, numeric=self.numeric, parts=dict(self.parts))

    def releases_json(self) -> str:
        """Spell the names of what is released as canonical JSON."""
        return canonical_json(list(self.releases)).decode()


@dataclass(frozen=True, kw_only=True)
class Entry(Hashed):
    """One line of the ledger. ``rdp_*`` are decimal integers in units of 1e-12, or ``inf``.

    A later state of a charge is a new entry with the same ``charge_id`` and a charge of 0: entries never change.
    Entries about the ledger itself leave empty what only a charge has, and say in ``mechanism`` what happened.
    """

    # In Python ``mechanism`` is what was charged; the text, which is hashed, may say anything.

    version: int
    ledger_id: str
    seq: int
    prev_hash: str
    charge_id: str
    state: State
    mechanism_text: Annotated[str, Field(alias="mechanism")]
    rdp_charge: str
    rdp_total: str
    rdp_budget: str
    run_id: str
    round: int
    plan_hash: str
    code_hash: str
    model_in_hash: str
    output_hash: str
    releases: str
    rng: str
    time: str

    @property
    def line(self) -> bytes:
        """The canonical JSON."""
        document = asdict(self)
        document["mechanism"] = document.pop("mechanism_text")
        return canonical_json(document)

    @property
    def mechanism(self) -> Mechanism | None:
        """What a charge was charged as; None without privacy.

        Raises:
            BadInputError: the entry is no charge's, or its mechanism cannot be read.
        """
        return parse(self.mechanism_text).mechanism

    @classmethod
    def parse(cls, line: bytes | str) -> Entry:
        """Read an entry.

        Raises:
            BadInputError: it is none.
        """
        try:
            document = json.loads(line)
            if {name: type(value) for name, value in document.items()} != ENTRY_TYPES:
                raise TypeError("other fields or types than an entry has")
            return cls(mechanism_text=document.pop("mechanism"), **document)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise BadInputError("a line cannot be read, must be one JSON object with an entry's fields") from error


ENTRY_FIELDS = tuple(field.name.removesuffix("_text") for field in fields(Entry))
"""As they are spelled, in the order of the columns that format version 1 had."""
ENTRY_TYPES: dict[str, type] = {name: int if name in ("version", "seq", "round") else str for name in ENTRY_FIELDS}


def add_units(total: str, charge: str) -> str:
    """Add two RDP amounts; infinity absorbs."""
    if INFINITE in (total, charge):
        return INFINITE
    return str(int(total) + int(charge))
