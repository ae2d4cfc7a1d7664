"""Ledgers and charges to test with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from conclave.privacy.accounting.mechanisms import SampledGaussian
from conclave.privacy.ledger import ChargeRequest, Entry, Genesis, Ledger, Reservation, SignedHead
from conclave.privacy.ledger.heads import public_hex
from conclave.privacy.ledger.reading.history import open_history

DELTA = 1e-5
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
MACHINE = "test"


def genesis(
    epsilon: float = 8.0, mode: str = "simulation", key: Ed25519PrivateKey = KEY, unit: str = "record"
) -> Genesis:
    return Genesis.new(
        public_key=public_hex(key),
        dataset_id="test",
        split_key="00",
        unit=unit,
        epsilon=epsilon,
        delta=DELTA,
        mode=mode,
        machine_id=MACHINE,
    )


def new_ledger(folder: Path, *, witness=None, **options) -> Ledger:
    return Ledger.create(folder / "ledger.db", genesis(**options), KEY, witness=witness)


def open_ledger(folder: Path, **options) -> Ledger:
    return Ledger(folder / "ledger.db", KEY, **options)


def entries_of(path: Path) -> list[Entry]:
    return [Entry.parse(line) for line in open_history(path).lines()]


@dataclass
class Lines:
    """A history in memory, for audits of what was altered."""

    genesis: Genesis
    entries: list[Entry]
    key: Ed25519PrivateKey | None = KEY  # None: the head is what it was before the alterations
    head: SignedHead | None = None

    def __post_init__(self):
        if self.head is None or self.key is not None:
            last = self.entries[-1].hash if self.entries else self.genesis.hash
            self.head = SignedHead.sign(self.key, self.genesis.ledger_id, len(self.entries), last)

    def lines(self):
        return iter([entry.line for entry in self.entries])


def request(round_number: int = 1, sigma: float | None = 2.0, rng: str = "os-entropy", **changes) -> ChargeRequest:
    values = {
        "kind": "train",
        "run_id": "7",
        "round": round_number,
        "plan_hash": "p" * 64,
        "model_in_hash": "m" * 64,
        "code_hash": "c" * 64,
        "mechanism": None if sigma is None else SampledGaussian(sampling_rate=0.5, noise_multiplier=sigma, steps=1),
        "clip": 1.0,
        "releases": ("delta",),
        "numeric": "fast",
        "rng": rng,
    }
    return ChargeRequest(**(values | changes))


def spend(ledger: Ledger, rounds: int, body: bytes = b"reply", **options) -> None:
    start = sum(entry.state == "RESERVED" for entry in ledger.entries())
    for round_number in range(start + 1, start + rounds + 1):
        reservation = ledger.reserve(request(round_number, **options), bytes(32))
        assert isinstance(reservation, Reservation)
        ledger.commit(reservation, body)
