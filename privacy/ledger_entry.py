"""What a ledger records: its genesis, its entries, and how they are hashed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Literal

from privacy.accounting import SampledGaussian
from privacy.canonical import canonical_json, decimal, sha256

FORMAT_VERSION = 1
INFINITE = "inf"

State = Literal["RESERVED", "COMMITTED", "ABANDONED"]


@dataclass(frozen=True, kw_only=True)
class Genesis:
    """What never changes in a ledger. Numbers are exact decimal strings.

    mode: ``simulation`` ledgers accept seeded randomness and ``mechanism = none``; ``deployment`` ones never.
    order, rdp_budget: the filter that enforces (epsilon, delta); see :mod:`privacy.accounting`.
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
    mode: Literal["simulation", "deployment"]
    machine_id: str
    public_key: str
    time: str

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical genesis: the ``prev_hash`` of the first entry."""
        return sha256(canonical_json(asdict(self)))


@dataclass(frozen=True, kw_only=True)
class ChargeRequest:
    """What a node is about to spend, and on what. Nothing here derives from private data.

    mechanism: None is training without privacy, charged ε = ∞ (simulation only).
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
    mechanism: SampledGaussian | None
    clip: float
    releases: tuple[str, ...]
    numeric: Literal["strict", "fast", "uncertified"]
    rng: Literal["os-entropy", "seeded"]

    def charge_id(self, ledger_id: str) -> str:
        """Identify the charge by its whole content, so other content is another charge."""
        return sha256(
            canonical_json([self.run_id, self.round, ledger_id, self.plan_hash, self.model_in_hash, self.kind])
        )

    def mechanism_json(self) -> str:
        """Spell the mechanism as canonical JSON, enough to recompute its cost."""
        document: dict[str, object] = {"kind": "none"}
        if self.mechanism is not None:
            document = {
                "kind": "gaussian",
                "sigma": decimal(self.mechanism.noise_multiplier),
                "clip": decimal(self.clip),
                "q": decimal(self.mechanism.sampling_rate),
                "steps": self.mechanism.steps,
                "sampler": "poisson",
                "numeric": self.numeric,
            }
        return canonical_json(document).decode()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the ledger. ``rdp_*`` are decimal integers in units of 1e-12, or ``inf``.

    A later state of a charge is a new entry with the same ``charge_id`` and a charge of 0: entries never change.
    ``signature`` is empty in format version 1 until heads are signed.
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
    entry_hash: str = ""
    signature: str = ""

    def computed_hash(self) -> str:
        """SHA-256 over every field but the hash and the signature themselves."""
        document = asdict(self)
        del document["entry_hash"], document["signature"]
        return sha256(canonical_json(document))


ENTRY_FIELDS = tuple(field.name for field in fields(Entry))


def add_units(total: str, charge: str) -> str:
    """Add two RDP amounts; infinity absorbs."""
    if INFINITE in (total, charge):
        return INFINITE
    return str(int(total) + int(charge))
