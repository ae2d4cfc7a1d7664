"""What the node's own noise costs beside torch's, and per-unit draws beside one shared stream.

``standard_normal`` (ChaCha20, Box–Muller, float64) against ``torch.normal`` (Mersenne Twister, no secret) in float32
and float64, with 1 and 2 threads. All methods are interleaved in one process; seconds are medians after one warm-up.
One JSON object a line with --json: method, dtype, threads, values, seconds, and ``ratio_float32`` and
``ratio_float64`` to ``torch.normal`` of that dtype with as many threads. ``spread`` is the slowest run over the
fastest: far above 1.3, the machine was not quiet.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from conclave.privacy.randomness import derive, per_unit_uniform, standard_normal

SECRET = derive(bytes(32), "benchmark")
UNITS, DRAWS = 10_000, 64

Method = tuple[str, str]


def methods(values: int) -> dict[Method, Callable[[], Tensor]]:
    """The name and dtype of each method, and a call that draws."""
    unit_B = torch.arange(UNITS)
    return {
        ("torch.normal", "float32"): lambda: torch.normal(0.0, 1.0, (values,), dtype=torch.float32),
        ("torch.normal", "float64"): lambda: torch.normal(0.0, 1.0, (values,), dtype=torch.float64),
        ("torch.randn", "float32"): lambda: torch.randn(values, dtype=torch.float32),
        ("torch.randn", "float64"): lambda: torch.randn(values, dtype=torch.float64),
        ("standard_normal", "float64"): lambda: standard_normal(SECRET, values),
        ("per_unit_uniform", "float64"): lambda: per_unit_uniform(SECRET, 0, unit_B, DRAWS),
        ("torch.rand", "float64"): lambda: torch.rand(UNITS, DRAWS, dtype=torch.float64),
    }


def measure(values: int, repeats: int) -> Iterable[dict[str, object]]:
    """Time every method with 1 and 2 threads, interleaved."""
    draw = methods(values)
    times: dict[tuple[Method, int], list[float]] = {(method, threads): [] for threads in (1, 2) for method in draw}
    for _ in range(repeats + 1):
        for (method, threads), seconds in times.items():
            torch.set_num_threads(threads)
            started = time.perf_counter()
            draw[method]()
            seconds.append(time.perf_counter() - started)
    median = {key: statistics.median(seconds[1:]) for key, seconds in times.items()}
    for (method, threads), seconds in times.items():
        name, dtype = method
        row: dict[str, object] = {"method": name, "dtype": dtype, "threads": threads}
        if name in ("per_unit_uniform", "torch.rand"):
            row |= {"units": UNITS, "draws": DRAWS, "values": UNITS * DRAWS}
        else:
            row |= {"values": values}
            for other in ("float32", "float64"):
                ratio = median[method, threads] / median[("torch.normal", other), threads]
                row[f"ratio_{other}"] = round(ratio, 3)
        yield row | {
            "seconds": round(median[method, threads], 4),
            "spread": round(max(seconds[1:]) / min(seconds[1:]), 2),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--values", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    for row in measure(options.values, options.repeats):
        print(json.dumps(row) if options.json else row)


if __name__ == "__main__":
    main()
