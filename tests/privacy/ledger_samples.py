"""Ledgers and charges to test with."""

from __future__ import annotations

from pathlib import Path

from privacy.accounting import SampledGaussian, budget_units, fixed_order
from privacy.canonical import decimal
from privacy.ledger import Ledger, Reservation, utc_now
from privacy.ledger_entry import FORMAT_VERSION, ChargeRequest, Genesis

DELTA = 1e-5


def genesis(epsilon: float = 8.0, mode: str = "simulation", ledger_id: str = "a" * 32) -> Genesis:
    order = fixed_order(epsilon, DELTA)
    return Genesis(
        version=FORMAT_VERSION,
        ledger_id=ledger_id,
        dataset_id="test",
        split_key="00",
        unit="record",
        adjacency="add-or-remove-one",
        epsilon=decimal(epsilon),
        delta=decimal(DELTA),
        order=decimal(order),
        rdp_budget=str(budget_units(epsilon, DELTA, order)),
        mode=mode,
        machine_id="test",
        public_key="00" * 32,
        time=utc_now(),
    )


def new_ledger(folder: Path, **options) -> Ledger:
    return Ledger.create(folder / "ledger.db", genesis(**options))


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
    start = len({entry.charge_id for entry in ledger.entries()})
    for round_number in range(start + 1, start + rounds + 1):
        reservation = ledger.reserve(request(round_number, **options), bytes(32))
        assert isinstance(reservation, Reservation)
        ledger.commit(reservation, body)
