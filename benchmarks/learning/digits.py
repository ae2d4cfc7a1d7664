"""Accuracy, privacy, traffic and time of the scenario `digits`, with and without privacy.

One JSON object a line with --json: scenario, seed, accuracy, accuracy_without_experts, epsilon, bytes_share, seconds.
"""

from __future__ import annotations

import argparse
import json

from whole_run import whole_run

from conclave.server.scenario import read_scenario
from conclave.simulations.shipped import find

SCENARIOS = ("digits", "digits-open")


def measure(name: str, seed: int) -> dict[str, object]:
    scenario = read_scenario(find(name), {"seed": seed})
    run = whole_run(scenario)
    summary, last = run.summary, run.metrics[-1]
    return {
        "scenario": name,
        "seed": seed,
        "accuracy": round(summary.accuracy, 4),
        "accuracy_without_experts": round(last["accuracy_without_experts"], 4),
        "epsilon": summary.epsilon if summary.epsilon != float("inf") else "inf",
        "max_over_mean_load": run.max_over_mean_load,
        "bytes_per_node": summary.bytes_per_node,
        "bytes_share": round(summary.bytes_per_node / summary.bytes_full_model, 4),
        "seconds": round(run.seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    for name in SCENARIOS:
        rows = [measure(name, seed) for seed in range(1, options.seeds + 1)]
        mean = sum(row["accuracy"] for row in rows) / len(rows)  # type: ignore[misc]
        for row in rows:
            print(json.dumps(row) if options.json else row)
        print(json.dumps({"scenario": name, "mean_accuracy": round(mean, 4)}))


if __name__ == "__main__":
    main()
