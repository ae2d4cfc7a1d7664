"""What a ledger records: its genesis, its entries, and how they are hashed."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from typing import Literal

from conclave.base.canonical import canonical_json, decimal, sha256
from conclave.base.errors import BadInputError
from conclave.privacy.accounting.filter import budget_units, fixed_order
from conclave.privacy.accounting.mechanisms import Mechanism
from conclave.privacy.ledger.mechanism_text import check_named, spell

FORMAT_VERSION = 2
INFINITE = "inf"

Side = Literal["training", "held-out"]
Mode = Literal["simulation", "deployment"]

State = Literal["RESERVED", "COMMITTED", "ABANDONED", "ADMITTED", "CLOSED", "ROTATED", "RESTORED", "MIGRATED"]
"""RESERVED → COMMITTED | ABANDONED is the life of a charge, ADMITTED → CLOSED of the budget set aside for a plan. The
other three are about the ledger itself: a new key, a start from a restored copy, a newer format."""


@dataclass(frozen=True, kw_only=True)
class Hashed:
    """One line of a history: canonical JSON that is stored, exported and hashed; the next line names its hash."""

    @property
    def line(self) -> bytes:
        """The canonical JSON."""
        return canonical_json(asdict(self))

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON."""
        return sha256(self.line)


@dataclass(frozen=True, kw_only=True)
class Genesis(Hashed):
    """What never changes in a ledger. Numbers are exact decimal strings.

    mode: ``simulation`` ledgers accept seeded randomness and ``mechanism = none``; ``deployment`` ones never.
    order, rdp_budget: the filter that enforces (epsilon, delta); see :mod:`conclave.privacy.accounting.filter`.
    held_out: the share of units that is kept out of training, for evaluation alone; ``split_key`` decides which.
    side: which of the two this ledger is for. Each side has its own ledger and budget, and no unit is on both.
    public_key: the first signing key; its hash is the ledger's identity, also after rotations.
    """

    version: int
    ledger_id: str
    dataset_id: str
    split_key: str
    unit: str
    adjacency: str
    epsilon: str
    delta: str
    order: str
    rdp_budget: str
    mode: Mode
    machine_id: str
    public_key: str
    time: str
    held_out: str = "0"
    side: Side = "training"

    @property
    def line(self) -> bytes:
        """The canonical JSON, as it always was where nothing is held out."""
        document = asdict(self)
        if self.held_out == "0":
            del document["held_out"], document["side"]
        return canonical_json(document)

    @classmethod
    def new(
        cls,
        *,
        public_key: str,
        dataset_id: str,
        split_key: str,
        unit: str,
        epsilon: float,
        delta: float,
        mode: Mode,
        machine_id: str,
        held_out: float = 0.0,
        side: Side = "training",
    ) -> Genesis:
        """Begin a ledger with the budget (ε, δ), which is enforced at the order that suits it.

        Raises:
            BadInputError: the budget allows no release at all, or all units are held out.
        """
        if not 0.0 <= held_out < 1.0:
            raise BadInputError(f"held_out is {held_out}, must be at least 0 and below 1")
        order = fixed_order(epsilon, delta)
        return cls(
            version=FORMAT_VERSION,
            ledger_id=ledger_id_of(public_key),
            dataset_id=dataset_id,
            split_key=split_key,
            unit=unit,
            adjacency="add-or-remove-one",
            epsilon=decimal(epsilon),
            delta=decimal(delta),
            order=decimal(order),
            rdp_budget=str(budget_units(epsilon, delta, order)),
            mode=mode,
            machine_id=machine_id,
            public_key=public_key,
            time=utc_now(),
            held_out=decimal(held_out),
            side=side,
        )

    def for_held_out(self, public_key: str) -> Genesis:
        """Return the genesis of the ledger for the units that this one's side leaves out: the same data and budget."""
        return replace(self, side="held-out", public_key=public_key, ledger_id=ledger_id_of(public_key))

    @classmethod
    def parse(cls, line: bytes | str) -> Genesis:
        """Read a genesis.

        Raises:
            BadInputError: it is none.
        """
        try:
            genesis = cls(**json.loads(line))
            genesis._check()
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise BadInputError(
                "the genesis cannot be read, must be one JSON object with a ledger's constants"
            ) from error
        return genesis

    def _check(self) -> None:
        values = asdict(self)
        if type(values.pop("version")) is not int or not all(type(value) is str for value in values.values()):
            raise TypeError("other types than a genesis has")
        epsilon, delta, order = float(self.epsilon), float(self.delta), float(self.order)
        if not (1 <= self.version <= FORMAT_VERSION and int(self.rdp_budget) > 0):
            raise ValueError("another format, or no budget")
        if self.mode not in ("simulation", "deployment"):
            raise ValueError("another mode")
        if not (0.0 < epsilon < math.inf and 0.0 < delta < 1.0 and 1.0 < order < math.inf):
            raise ValueError("numbers that no budget can have")
        if self.side not in ("training", "held-out") or not 0.0 <= float(self.held_out) < 1.0:
            raise ValueError("no such side, or no such share of units")
        if self.side == "held-out" and self.held_out == "0":
            raise ValueError("a ledger for units that do not exist")
        budget_units(epsilon, delta, order)
        _ = self.line  # raises where a string has no UTF-8


def utc_now() -> str:
    """Return the current time as an ISO 8601 string in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def ledger_id_of(public_key: str) -> str:
    """Return the identity of a ledger: 32 hexadecimal digits of the hash of its first public key."""
    return sha256(bytes.fromhex(public_key))[:32]


def charge_id_of(
    kind: str, *, ledger_id: str, run_id: str, round_number: int, plan_hash: str, model_in_hash: str
) -> str:
    """Identify a charge by its whole content, so other content is another charge; whoever asks can work it out."""
    return sha256(canonical_json([run_id, round_number, ledger_id, plan_hash, model_in_hash, kind]))


@dataclass(frozen=True, kw_only=True)
class ChargeRequest:
    """What a node is about to spend, and on what. Nothing here derives from private data.

    mechanism: None is training without privacy, charged ε = ∞ (simulation only).
    parts: σ of each release by name, where several are made from one Poisson sample: they are one charge.
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

    version: int
    ledger_id: str
    seq: int
    prev_hash: str
    charge_id: str
    state: State
    mechanism: str
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

    @classmethod
    def parse(cls, line: bytes | str) -> Entry:
        """Read an entry.

        Raises:
            BadInputError: it is none.
        """
        try:
            entry = cls(**json.loads(line))
            if any(type(getattr(entry, name)) is not kind for name, kind in ENTRY_TYPES.items()):
                raise TypeError("other types than an entry has")
            return entry
        except (ValueError, TypeError, RecursionError) as error:
            raise BadInputError("a line cannot be read, must be one JSON object with an entry's fields") from error


ENTRY_FIELDS = tuple(field.name for field in fields(Entry))
ENTRY_TYPES: dict[str, type] = {name: int if name in ("version", "seq", "round") else str for name in ENTRY_FIELDS}


def add_units(total: str, charge: str) -> str:
    """Add two RDP amounts; infinity absorbs."""
    if INFINITE in (total, charge):
        return INFINITE
    return str(int(total) + int(charge))
