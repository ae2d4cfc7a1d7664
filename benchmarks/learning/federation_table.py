"""What splitting a model into experts costs and saves: dense baselines, and MoE with all, 1/2, 1/4, 1/8 of its experts.

Same data, seeds, mechanism and (ε, δ) in every row. `digits` always; `mnist`, IID and Dirichlet(0.3) on ten nodes at
ε = 3, where there is a scenario of that name and CONCLAVE_DATA says where its files lie.
With --out, every finished cell is a line of that file and is not run again; one of a changed scenario is.
One JSON object a line with --json: data, row, seed, accuracy, bytes_per_node (a round, both ways), seconds, top_k,
experts_per_node, parameters, epsilon, scenario (a hash). A node cannot hold fewer experts than a token visits, so a row
with one expert a node has top_k 1, and says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from whole_run import whole_run

from conclave.model.costs import costs_of
from conclave.server.scenario import Scenario, read_scenario
from conclave.simulations.baselines import baseline
from conclave.simulations.shipped import find, shipped

Row = dict[str, object]

_BUDGET = {"privacy.epsilon": 3.0, "privacy.delta": 1e-5}
DATA: dict[str, tuple[str, dict[str, Any]]] = {
    "digits": ("digits", {}),
    "mnist-iid": ("mnist", _BUDGET | {"partition": {"scheme": "iid", "nodes": 10}}),
    "mnist-dirichlet": ("mnist", _BUDGET | {"partition": {"scheme": "dirichlet", "nodes": 10, "alpha": 0.3}}),
}
SHARES = {"moe-all": 1, "moe-1/2": 2, "moe-1/4": 4, "moe-1/8": 8}
ROWS = ("dense-total", "dense-active", *SHARES)


def available() -> list[str]:
    """The data sets that can be run here."""
    here = "mnist" in shipped() and "CONCLAVE_DATA" in os.environ
    return [name for name, (scenario, _) in DATA.items() if scenario != "mnist" or here]


def cell(data: str, row: str, seed: int) -> Scenario:
    """Return the scenario of one cell."""
    name, changes = DATA[data]
    scenario = read_scenario(find(name), {**changes, "seed": seed})
    if row == "dense-total" or row == "dense-active":
        return baseline(scenario, row)[0]
    routed, top_k = scenario.model.experts.routed, scenario.model.experts.top_k
    held = max(1, routed // SHARES[row])
    more = {"federation.experts_per_node": held, "model.experts.top_k": min(top_k, held)}
    more["federation.assignment"] = "all" if held == routed else "balanced"
    return read_scenario(find(name), {**changes, **more, "seed": seed})


def key(data: str, row: str, seed: int, scenario: Scenario) -> tuple[object, ...]:
    """What tells a cell from others, and from itself under another scenario."""
    return data, row, seed, hashlib.sha256(scenario.toml_for_hash().encode()).hexdigest()[:16]


def run(data: str, row: str, seed: int, scenario: Scenario, workers: int) -> Row:
    """Simulate one cell."""
    summary, _, seconds = whole_run(scenario, workers=workers)
    return {
        "data": data,
        "row": row,
        "seed": seed,
        "accuracy": round(summary.accuracy or 0.0, 4),
        "bytes_per_node": summary.bytes_per_node,
        "seconds": round(seconds, 1),
        "top_k": scenario.model.experts.top_k,
        "experts_per_node": scenario.federation.experts_per_node,
        "parameters": costs_of(scenario.model).total,
        "epsilon": summary.epsilon if summary.epsilon != float("inf") else "inf",
        "scenario": key(data, row, seed, scenario)[-1],
    }


def finished(path: Path | None) -> dict[tuple[object, ...], Row]:
    """Return the cells of a results file; of a line that a kill cut short, nothing."""
    rows = {}
    for line in path.read_text().splitlines() if path is not None and path.is_file() else ():
        try:
            row = json.loads(line)
            rows[tuple(row[name] for name in ("data", "row", "seed", "scenario"))] = row
        except (ValueError, KeyError, TypeError):
            continue
    return rows


def keep(path: Path, row: Mapping[str, object]) -> None:
    """Append a cell, on a line of its own even where the last one was cut short."""
    cut = path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with path.open("a") as stream:
        stream.write("\n" * bool(cut) + json.dumps(row) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def table(
    data: list[str], rows: list[str], seeds: list[int], out: Path | None, do: Callable[..., Row]
) -> Iterator[Row]:
    """Yield every cell asked for; run with ``do`` those that the results file does not have."""
    done = finished(out)
    for name in data:
        for row in rows:
            for seed in seeds:
                scenario = cell(name, row, seed)
                found = done.get(key(name, row, seed, scenario))
                if found is None:
                    found = do(name, row, seed, scenario)
                    if out is not None:
                        keep(out, found)
                yield found


def main() -> None:
    """Run what was asked for and is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="the results file; finished cells in it are not run again")
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=available())
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--workers", type=int, default=1)
    chosen = parser.parse_args()

    def do(name: str, row: str, seed: int, scenario: Scenario) -> Row:
        return run(name, row, seed, scenario, chosen.workers)

    for row in table(chosen.data, chosen.rows, chosen.seeds, chosen.out, do):
        text = json.dumps(row) if chosen.json else "  ".join(f"{name} {value}" for name, value in row.items())
        print(text, flush=True)


if __name__ == "__main__":
    main()
