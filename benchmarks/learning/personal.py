"""Accuracy of every node on its own held-out records where it has two classes: federated, mixed and local experts.

The last model is measured once, at ε = 1000 of the held-out side where training is private, so that noise does not show
(standard error 0.0004 of a mean over nodes); training spends its own ε = 8.
One JSON object a line with --json: scenario, scope, experts, seed, personal, worst, public, epsilon, seconds.
"""

from __future__ import annotations

import argparse
import json

from whole_run import whole_run

from conclave.server.scenario import read_scenario
from conclave.simulations.shipped import find

TWO_CLASSES = {"partition.scheme": "pathological", "partition.labels_per_node": 2}
SCOPES: dict[str, dict[str, object]] = {
    "federated, all experts": {"evaluation.experts": "all"},
    "federated, balanced": {},
    "federated, sticky": {"federation.assignment": "sticky"},
    "mixed, 4 of 8 local, sticky": {
        "federation.assignment": "sticky", "federation.expert_scope": "mixed", "federation.local_experts": 4,
    },
    "local, balanced": {"federation.expert_scope": "local"},
    "local, sticky": {"federation.assignment": "sticky", "federation.expert_scope": "local"},
}  # fmt: skip


def measure(name: str, scope: str, seed: int) -> dict[str, object]:
    once = {"evaluation.every": 1_000_000, "evaluation.held_out": 0.2, "evaluation.epsilon": 1000.0}
    scenario = read_scenario(find(name), TWO_CLASSES | once | SCOPES[scope] | {"seed": seed})
    run = whole_run(scenario)
    measured = run.summary.held_out
    if measured is None:
        raise RuntimeError("the run measured nothing on held-out records")
    return {
        "scenario": name,
        "scope": scope,
        "seed": seed,
        "personal": round(measured["over_nodes"][0], 4),
        "worst": round(min(pair[0] for pair in measured["by_node"].values()), 4),
        "public": run.summary.accuracy,
        "epsilon": run.summary.epsilon if run.summary.epsilon != float("inf") else "inf",
        "seconds": round(run.seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    for name in ("digits", "digits-open"):
        for scope in SCOPES:
            rows = [measure(name, scope, seed) for seed in range(1, options.seeds + 1)]
            for row in rows:
                print(json.dumps(row) if options.json else row, flush=True)
            mean = sum(float(str(row["personal"])) for row in rows) / len(rows)
            print(json.dumps({"scenario": name, "scope": scope, "mean_personal": round(mean, 4)}), flush=True)


if __name__ == "__main__":
    main()
