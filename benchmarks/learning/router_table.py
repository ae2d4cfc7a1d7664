"""What each router makes of the shipped scenarios, with privacy (digits, stdlib-text) and without.

digits-open is shipped; stdlib-text-open is stdlib-text with the changes in OPEN_TEXT. Whole federations. Every router
replaces the scenario's own, with the options below and nothing else changed, so none of them is tuned.
One JSON object a line with --json: scenario, router, seed, accuracy or bits_per_byte, the same with the routed
experts silenced, max_over_mean_load on public test records, bytes_per_node, seconds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable

from whole_run import whole_run

from conclave.server.scenario import read_scenario
from conclave.simulations.shipped import find

ROUTERS = {
    "softmax": {"kind": "softmax"},
    "sigmoid": {"kind": "sigmoid"},
    "attention": {"kind": "attention"},
    "hierarchical": {"kind": "hierarchical", "groups": 4, "top_groups": 2},
    "group-limited": {"kind": "hierarchical", "style": "group-limited", "groups": 4, "top_groups": 2},
    "policy": {"kind": "policy", "rollouts": 2},
    "top-p": {"kind": "top-p", "mass": 0.7},
}


OPEN_TEXT = {
    "privacy.mechanism": "none",
    "privacy.sampling_rate": 0.002,
    "training.steps": 5,
    "training.learning_rate": 1.0,
}
"""What stdlib-text needs without privacy: smaller batches, more and shorter steps. Its own settings diverge."""


def run(name: str, router: str, seed: int) -> dict[str, object]:
    """Simulate a scenario with one router."""
    changes: dict[str, object] = {"model.experts.router": dict(ROUTERS[router]), "seed": seed}
    shipped = name
    if name == "stdlib-text-open":
        shipped = "stdlib-text"
        changes.update(OPEN_TEXT)
    if name.startswith("digits") and router != "softmax":
        # One token an example: the loss that does not degenerate. The scenario's own router stays as it is.
        changes["model.experts.router"] = {**ROUTERS[router], "balance_loss": "uniform"}
    scenario = read_scenario(find(shipped), changes)
    finished = whole_run(scenario)
    last = finished.metrics[-1]
    measure = "accuracy" if "accuracy" in last else "bits_per_byte"
    return {
        "scenario": name,
        "router": router,
        "seed": seed,
        measure: round(last[measure], 4),
        "without_experts": round(last[f"{measure}_without_experts"], 4),
        "max_over_mean_load": finished.max_over_mean_load,
        "bytes_per_node": finished.summary.bytes_per_node,
        "seconds": round(finished.seconds, 1),
    }


def main() -> None:
    """Run what was asked for: the digits by default, for a run of stdlib-text takes three to six minutes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--scenarios", nargs="+", default=["digits", "digits-open"])
    parser.add_argument("--routers", nargs="+", default=list(ROUTERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    chosen = parser.parse_args()
    for row in _rows(chosen):
        text = json.dumps(row) if chosen.json else "  ".join(f"{key} {value}" for key, value in row.items())
        print(text, flush=True)


def _rows(chosen: argparse.Namespace) -> Iterable[dict[str, object]]:
    for name in chosen.scenarios:
        for router in chosen.routers:
            for seed in chosen.seeds:
                yield run(name, router, seed)


if __name__ == "__main__":
    main()
