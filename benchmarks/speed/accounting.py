"""What reading ε costs: curves built and kept, composing, ten thousand distinct (q, σ), a plan of several releases.

Rows, one JSON object a line with --json:
``curve``: one charge by each accountant, cold (nothing kept) and again with one more step (the curves are kept).
``growing``: a ledger of three kinds of charges read after every round; seconds of one reading, the median.
``equal``: a ledger of 500,000 equal charges, cold.
``distinct``: charges that all differ, cold: seconds, ε by each accountant, how they were rounded, and how far rounding
raised RDP. Rates and noise both differ in ``rates and noise``, only noise in ``noise``.
``enforced``: the price of one charge at the filter's order, distinct charges.
``calibration``: σ of a plan of three releases and choices.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable

import numpy as np

from conclave.privacy.accounting import accountants, pld_epsilon, prv_epsilon, rdp_curves
from conclave.privacy.accounting.accountants import accountant_report
from conclave.privacy.accounting.calibration import PlannedChoices, PlannedRelease, calibrate_plan
from conclave.privacy.accounting.filter import fixed_order
from conclave.privacy.accounting.mechanisms import ExponentialChoice, SampledGaussian
from conclave.privacy.accounting.prices import charge_units, rdp_at
from conclave.privacy.accounting.rdp_curves import CurveCache
from conclave.privacy.accounting.rounded_pairs import round_pairs

DELTA = 1e-5
Row = dict[str, object]


def charge(q: float, sigma: float, steps: int = 1) -> SampledGaussian:
    return SampledGaussian(sampling_rate=q, noise_multiplier=sigma, steps=steps)


def forget() -> None:
    """Drop every kept curve and result."""
    accountants._report.cache_clear()
    rdp_curves._kept.clear()
    pld_epsilon._curves = CurveCache(points=2**24)
    prv_epsilon._spectra = CurveCache(points=2**24)
    rdp_at.cache_clear()


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def curves(repeats: int) -> Iterable[Row]:
    methods: dict[str, Callable[[dict[tuple[float, float], int]], object]] = {
        "rdp": lambda steps: rdp_curves.rdp_curves(list(steps)),
        "pld": lambda steps: pld_epsilon.pld_epsilon(steps, DELTA),
        "prv": lambda steps: prv_epsilon.prv_epsilon(steps, DELTA),
    }
    for q, sigma, steps in ((0.01, 1.0, 1000), (0.05, 1.2, 200), (0.3, 5.0, 500)):
        for name, method in methods.items():
            cold, kept = [], []
            for _ in range(repeats):
                forget()
                cold.append(seconds(lambda m=method, q=q, s=sigma, n=steps: m({(q, s): n})))
                kept.append(seconds(lambda m=method, q=q, s=sigma, n=steps: m({(q, s): n + 1})))
            yield {
                "row": "curve",
                "accountant": name,
                "q": q,
                "sigma": sigma,
                "steps": steps,
                "cold_ms": round(1e3 * statistics.median(cold), 1),
                "kept_ms": round(1e3 * statistics.median(kept), 1),
            }


def growing() -> Row:
    forget()
    kinds = (charge(0.05, 1.5, 4), charge(0.2, 8.0), charge(1.0, 60.0))
    times = [
        seconds(lambda rounds=rounds: accountant_report(dict.fromkeys(kinds, rounds), DELTA))
        for rounds in range(20, 60)
    ]
    return {"row": "growing", "first_ms": round(1e3 * times[0], 1), "ms": round(1e3 * statistics.median(times[1:]), 1)}


def equal() -> Row:
    forget()
    took = seconds(lambda: accountant_report({charge(0.001, 4.0): 500_000}, DELTA))
    return {"row": "equal", "charges": 500_000, "seconds": round(took, 2)}


def distinct(pairs: int) -> Iterable[Row]:
    generator = np.random.default_rng(1)
    q_P, sigma_P = generator.uniform(0.01, 0.05, pairs), generator.uniform(1.0, 3.0, pairs)
    for name, rates in (("rates and noise", q_P), ("noise", np.full(pairs, 0.02))):
        steps = {(float(q), float(sigma)): 1 for q, sigma in zip(rates, sigma_P, strict=True)}
        charges = [charge(*pair) for pair in steps]
        forget()
        started = time.perf_counter()
        report = accountant_report(charges, DELTA)
        whole = time.perf_counter() - started
        forget()
        parts = {"rdp": seconds(lambda s=steps: rdp_curves.rdp_curves(list(s)))}
        merged, _ = round_pairs(steps, accountants.MOST_PAIRS)
        parts["pld"] = seconds(lambda m=merged: pld_epsilon.pld_epsilon(m, DELTA))
        parts["prv"] = seconds(lambda m=merged: prv_epsilon.prv_epsilon(m, DELTA))
        rounded = accountants._rdp_epsilon(merged, np.zeros(len(rdp_curves.ORDERS)), DELTA)
        yield {
            "row": "distinct",
            "differ": name,
            "pairs": pairs,
            "seconds": round(whole, 1),
            **{f"{key}_seconds": round(value, 1) for key, value in parts.items()},
            **{key: round(value, 4) for key, value in report.epsilon.items()},
            "rdp_rounded": round(rounded, 4),
            "rounding_percent": round(100 * (rounded / report.epsilon["rdp"] - 1), 2),
            "grid": report.grid,
        }


def enforced() -> Row:
    forget()
    order = fixed_order(8.0, DELTA)
    charges = [charge(0.02, 1.0 + index / 1000) for index in range(1000)]
    took = seconds(lambda: [charge_units(one, order) for one in charges])
    return {"row": "enforced", "ms_a_charge": round(took, 3)}


def calibration() -> Row:
    forget()
    parts = (("gradients", 0.97), ("expert-load", 0.03))
    plan = (
        PlannedRelease(sampling_rate=0.05, steps=4, charges=30, share=0.85, parts=parts),
        PlannedRelease(sampling_rate=0.2, steps=1, charges=30, share=0.1),
        PlannedRelease(sampling_rate=1.0, steps=1, charges=2, share=0.05),
    )
    choices = (PlannedChoices(mechanism=ExponentialChoice(epsilon=0.1, choices=5), charges=3),)
    took = seconds(lambda: calibrate_plan(epsilon=8.0, delta=DELTA, releases=plan, choices=choices))
    return {"row": "calibration", "releases": len(plan), "ms": round(1e3 * took, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    def rows() -> Iterable[Row]:
        yield from curves(options.repeats)
        yield growing()
        yield equal()
        yield enforced()
        yield calibration()
        yield from distinct(options.pairs)

    for row in rows():
        print(json.dumps(row, ensure_ascii=False) if options.json else row, flush=True)


if __name__ == "__main__":
    main()
