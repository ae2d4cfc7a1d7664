"""What the ledger costs: appending an entry durably, and verifying a long history.

``append``: one charge is two entries, RESERVED and COMMITTED; microseconds an entry in a simulation (no sync) and in
a deployment (FULL sync, signed, mirrored to a witness that is synced too). ``fsync`` is the disk alone: what one
``write`` and ``fsync`` of 4096 bytes cost here. ``open``: reading and checking a ledger file when a node starts.
``verify``: the audit of an export, of a ledger file, and of a history written in bulk (``--entries``, a million by
default), ε by all accountants included; ``accountants_seconds`` is their part. ``peak_mib`` is the growth of the
process' resident memory beyond what it held before.
One JSON object a line with --json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from conclave.base.canonical import canonical_json
from conclave.privacy.accounting.accountants import epsilon_by_accountant
from conclave.privacy.accounting.calibration import calibrate_noise
from conclave.privacy.accounting.mechanisms import SampledGaussian
from conclave.privacy.accounting.prices import charge_units
from conclave.privacy.ledger import ChargeRequest, Genesis, Ledger, Reservation, SignedHead
from conclave.privacy.ledger.heads import public_hex
from conclave.privacy.ledger.reading.history import LedgerExport, open_history, write_export
from conclave.privacy.ledger.reading.verification import audit_history
from conclave.privacy.ledger.witness import Witness

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
EPSILON, DELTA, RATE = 8.0, 1e-5, 0.01
MACHINE = "benchmark"


def genesis(mode: str) -> Genesis:
    """A ledger's constants."""
    return Genesis.new(
        public_key=public_hex(KEY),
        dataset_id="benchmark",
        split_key="00",
        unit="record",
        epsilon=EPSILON,
        delta=DELTA,
        mode=mode,  # type: ignore[arg-type]
        machine_id=MACHINE,
    )


def request(number: int, mechanism: SampledGaussian) -> ChargeRequest:
    """The charge of one round."""
    return ChargeRequest(
        kind="train",
        run_id="7",
        round=number,
        plan_hash="p" * 64,
        model_in_hash="m" * 64,
        code_hash="c" * 64,
        mechanism=mechanism,
        clip=1.0,
        releases=("delta",),
        numeric="strict",
        rng="os-entropy",
    )


def mechanism_for(charges: int) -> SampledGaussian:
    """A mechanism that a budget pays for so often."""
    noise = calibrate_noise(epsilon=EPSILON, delta=DELTA, sampling_rate=RATE, steps_per_charge=1, charges=charges)
    return SampledGaussian(sampling_rate=RATE, noise_multiplier=noise, steps=1)


def lines_in_bulk(head: Genesis, entries: int) -> Iterator[bytes]:
    """Yield the lines of a valid history of RESERVED and COMMITTED entries; the last item is the signed head."""
    mechanism = mechanism_for(entries // 2)
    price = charge_units(mechanism, float(head.order))
    charge = request(1, mechanism)
    constants = {
        "code_hash": charge.code_hash,
        "ledger_id": head.ledger_id,
        "mechanism": charge.mechanism_json(),
        "model_in_hash": charge.model_in_hash,
        "plan_hash": charge.plan_hash,
        "rdp_budget": head.rdp_budget,
        "releases": charge.releases_json(),
        "rng": charge.rng,
        "run_id": charge.run_id,
        "time": head.time,
        "version": head.version,
    }
    changing = {
        name: f"<{name}>" for name in (
            "charge_id", "output_hash", "prev_hash", "rdp_charge", "rdp_total", "round", "seq", "state"
        )
    }  # fmt: skip
    template = canonical_json(constants | changing).decode().replace("%", "%%")
    for name in changing:
        whole_number = name in ("round", "seq")
        spelled = f'"<{name}>"' if whole_number else f"<{name}>"
        template = template.replace(spelled, f"%({name})s")
    prev, total = head.hash, 0
    for seq in range(1, entries + 1):
        reserved = seq % 2 == 1
        number = (seq + 1) // 2
        total += price if reserved else 0
        line = (
            template
            % {
                "charge_id": f"{number:064x}",
                "output_hash": "" if reserved else f"{seq:064x}",
                "prev_hash": prev,
                "rdp_charge": price if reserved else 0,
                "rdp_total": total,
                "round": number,
                "seq": seq,
                "state": "RESERVED" if reserved else "COMMITTED",
            }
        ).encode()
        prev = hashlib.sha256(line).hexdigest()
        yield line
    yield SignedHead.sign(KEY, head.ledger_id, entries, prev).line


def write_in_bulk(path: Path, entries: int) -> None:
    """Write an export of a history that no ledger could make in reasonable time."""
    head = genesis("deployment")
    with path.open("wb") as stream:
        stream.write(head.line + b"\n")
        for line in lines_in_bulk(head, entries):
            stream.write(line + b"\n")


def measure_append(folder: Path, mode: str, charges: int) -> Iterable[dict[str, object]]:
    """Time single charges; yields the cost of an entry, then of opening and verifying what was written."""
    path = folder / f"{mode}.db"
    witness = Witness(folder / "witness" / "head.json") if mode == "deployment" else None
    ledger = Ledger.create(path, genesis(mode), KEY, witness=witness)
    mechanism = mechanism_for(charges)
    reserving, committing = [], []
    for number in range(1, charges + 1):
        started = time.perf_counter()
        reservation = ledger.reserve(request(number, mechanism), bytes(32))
        between = time.perf_counter()
        assert isinstance(reservation, Reservation)
        ledger.commit(reservation, b"reply")
        reserving.append(between - started)
        committing.append(time.perf_counter() - between)
    ledger.close()
    for what, seconds in (("reserve", reserving), ("commit", committing)):
        yield {
            "what": f"append: {what}",
            "mode": mode,
            "entries": charges,
            "us_an_entry": round(1e6 * statistics.median(seconds), 1),
            "p95": round(1e6 * statistics.quantiles(seconds, n=20)[-1], 1),
        }
    started = time.perf_counter()
    Ledger(path, KEY, witness=witness, machine=MACHINE).close()
    seconds_open = time.perf_counter() - started
    yield {
        "what": "open", "mode": mode, "entries": 2 * charges, "seconds": round(seconds_open, 4),
        "us_an_entry": round(1e6 * seconds_open / (2 * charges), 2),
    }  # fmt: skip
    with (folder / f"{mode}.jsonl").open("wb") as out:
        write_export(open_history(path), out)
    epsilon_by_accountant([mechanism] * charges, DELTA)
    for name in (f"{mode}.jsonl", f"{mode}.db"):
        yield verify(folder / name)


def measure_fsync(folder: Path, repeats: int) -> dict[str, object]:
    """Time the disk alone."""
    seconds = []
    with (folder / "plain").open("wb") as stream:
        for _ in range(repeats):
            started = time.perf_counter()
            stream.write(bytes(4096))
            stream.flush()
            os.fsync(stream.fileno())
            seconds.append(time.perf_counter() - started)
    return {"what": "fsync", "us": round(1e6 * statistics.median(seconds), 1)}


def verify(path: Path) -> dict[str, object]:
    """Audit a history three times; the median, and the cost of an entry without the accountants."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        audit = audit_history(open_history(path))
        seconds.append(time.perf_counter() - started)
    assert not audit.findings
    return {
        "what": f"verify {'database' if path.suffix == '.db' else 'export'}",
        "mode": audit.mode,
        "entries": audit.entries,
        "bytes": path.stat().st_size,
        "seconds": round(statistics.median(seconds), 4),
        "us_an_entry": round(1e6 * statistics.median(seconds) / audit.entries, 2),
    }


def open_in_bulk(folder: Path, entries: int) -> dict[str, object]:
    """Open a ledger file with a long history, as a node does when it starts, then audit it."""
    path = folder / "bulk.db"
    Ledger.create(path, genesis("simulation"), KEY).close()
    head = open_history(path).genesis
    *lines, last = lines_in_bulk(head, entries)
    signature = SignedHead.model_validate_json(last).signature
    db = sqlite3.connect(path)
    db.executemany(
        "INSERT INTO entries (seq, body, hash, signature) VALUES (?, ?, ?, ?)",
        (
            (seq, line.decode(), hashlib.sha256(line).hexdigest(), signature if seq == entries else "")
            for seq, line in enumerate(lines, start=1)
        ),
    )
    db.commit()
    db.close()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        Ledger(path, KEY).close()
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    return {"what": "open", "mode": "simulation", "entries": entries, "seconds": round(median, 4),
            "us_an_entry": round(1e6 * median / entries, 2)}  # fmt: skip


def verify_alone(path: Path) -> dict[str, object]:
    """Audit one export in this process, accountants included: its time, its memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    audit = audit_history(LedgerExport(path))
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert not audit.findings
    started = time.perf_counter()
    audit_history(LedgerExport(path))
    again = time.perf_counter() - started  # the accountants' results are kept for equal mechanisms
    return {
        "what": "verify in bulk",
        "mode": audit.mode,
        "entries": audit.entries,
        "bytes": path.stat().st_size,
        "bytes_an_entry": round(path.stat().st_size / audit.entries),
        "seconds": round(seconds, 2),
        "accountants_seconds": round(seconds - again, 2),
        "us_an_entry": round(1e6 * again / audit.entries, 2),
        "peak_mib": round(peak / 1024),
        "epsilon": audit.epsilon,
        "accountants": {name: round(value, 4) for name, value in audit.accountants.items()},
    }


def measure(folder: Path, charges: int, entries: int) -> Iterable[dict[str, object]]:
    """Yield all rows."""
    yield measure_fsync(folder, charges)
    for mode in ("simulation", "deployment"):
        yield from measure_append(folder, mode, charges)
    shorter = min(entries, 100_000)
    yield open_in_bulk(folder, shorter)
    epsilon_by_accountant([mechanism_for(shorter // 2)] * (shorter // 2), DELTA)
    yield verify(folder / "bulk.db")
    started = time.perf_counter()
    write_in_bulk(folder / "bulk.jsonl", entries)
    yield {"what": "write in bulk", "entries": entries, "seconds": round(time.perf_counter() - started, 1)}
    # A process of its own, so that memory is that of the audit.
    command = [sys.executable, __file__, "--verify", str(folder / "bulk.jsonl")]
    yield json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--charges", type=int, default=500)
    parser.add_argument("--entries", type=int, default=1_000_000, help="length of the history in bulk")
    parser.add_argument("--verify", type=Path, help="only audit this export")
    options = parser.parse_args()
    if options.verify:
        print(json.dumps(verify_alone(options.verify)))
        return
    with tempfile.TemporaryDirectory() as folder:
        for row in measure(Path(folder), options.charges, options.entries):
            print(json.dumps(row) if options.json else row)


if __name__ == "__main__":
    main()
