"""What a ledger was begun with: its genesis, which fixes data, budget and machine, and never changes."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Literal

from conclave.base.canonical import canonical_json, decimal, sha256
from conclave.base.errors import BadInputError
from conclave.privacy.accounting.filter import budget_units, fixed_order

FORMAT_VERSION = 2

Side = Literal["training", "held-out"]
Mode = Literal["simulation", "deployment"]


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
        """The canonical JSON, unchanged from earlier formats if nothing is held out."""
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


def check_pair(training: Genesis, held_out: Genesis) -> None:
    """Check that two ledgers are the two sides of one data set.

    Raises:
        BadInputError: a unit could be on both sides, or protected by neither.
    """
    if (training.side, held_out.side) != ("training", "held-out"):
        raise BadInputError(f"the ledgers are for {training.side} and {held_out.side} units, must be for both")
    for name in ("dataset_id", "split_key", "held_out", "unit", "adjacency", "mode"):
        if getattr(training, name) != getattr(held_out, name):
            raise BadInputError(f"the ledgers of training and held-out units differ in {name}, must be of one data set")
