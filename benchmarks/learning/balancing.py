"""What private load balancing does to expert load and quality, and what it costs in time.

* ``balance``: whole federations with and without ``[balancing]``, for routers with a selection bias and no balance loss
  beside it. ``max_over_mean`` and ``min_over_mean`` are loads of the final model on public test records;
  ``max_over_mean_late`` is the mean over the last third of the rounds. Quality is accuracy or bits per byte.
* ``overhead``: processor time of one private step with loads over one without, interleaved, medians after two warm-ups,
  one thread: the digits' model, and the transformer of stdlib-text. ``spread`` is the slowest run over the fastest.

One JSON object a line with --json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterable

import torch
from whole_run import whole_run

from conclave.model.building import build
from conclave.privacy.randomness import derive
from conclave.privacy.training.dpsgd_mechanism import DpSgd
from conclave.privacy.training.private_training import PrivateTraining
from conclave.server.scenario import read_scenario
from conclave.simulations.shipped import find

Row = dict[str, object]

ROUTERS: dict[str, tuple[dict[str, object], float]] = {
    "sigmoid": ({"kind": "sigmoid"}, 0.01),
    "softmax": ({"kind": "softmax", "selection_bias": True}, 0.05),
}
"""Router, and the rate of its bias: affinities lie in (0, 1), logits do not."""
SHARE, DECAY = 0.05, 0.8
EXAMPLES = {"digits": 98, "stdlib-text": 24}  # what a node samples in a step, about


def balance(name: str, router: str, seed: int, *, on: bool) -> Row:
    """Simulate one scenario."""
    options, rate = ROUTERS[router]
    changes: dict[str, object] = {"model.experts.router": dict(options), "model.experts.balance": 0.0, "seed": seed}
    if on:
        changes["balancing"] = {"share": SHARE, "rate": rate, "decay": DECAY}
    scenario = read_scenario(find(name), changes)
    run = whole_run(scenario)
    summary, lines, seconds = run
    measure = "accuracy" if "accuracy" in lines[-1] else "bits_per_byte"
    load = lines[-1]["load"][0]
    late = [max(line["load"][0]) * len(load) for line in lines[-(len(lines) // 3) :]]
    return {
        "measure": "balance", "scenario": name, "router": router, "seed": seed, "balancing": on,
        measure: round(lines[-1][measure], 4),
        "max_over_mean": run.max_over_mean_load,
        "max_over_mean_late": round(statistics.mean(late), 3),
        "min_over_mean": round(min(load) * len(load), 3),
        "epsilon": round(summary.epsilon, 4),
        "bytes_per_node": summary.bytes_per_node,
        "seconds": round(seconds, 1),
    }  # fmt: skip


def overhead(name: str, repeats: int) -> Row:
    """Time one private step of a scenario's own model, with loads and without."""
    scenario = read_scenario(find(name), {"model.experts.router": {"kind": "sigmoid"}})
    network = build(scenario.model, scenario.seed)
    batch = network.synthetic_batch(EXAMPLES[name])
    times: dict[float, list[float]] = {0.0: [], SHARE: []}
    for repeat in range(repeats + 2):
        for share, seconds in times.items():
            mechanism = DpSgd(
                steps=1, learning_rate=0.0, sampling_rate=1.0, clip=1.0, noise_multiplier=1.0, declared_size=100,
                load_share=share,
            )  # fmt: skip
            optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
            started = time.process_time()
            with PrivateTraining(network, optimizer, network.loss, mechanism, derive(bytes(32), repeat)) as training:
                training.step(batch)
            seconds.append(time.process_time() - started)
    without, with_loads = (statistics.median(seconds[2:]) for seconds in times.values())
    return {
        "measure": "overhead", "scenario": name, "examples": EXAMPLES[name], "milliseconds": round(without * 1e3, 2),
        "with_loads": round(with_loads * 1e3, 2), "ratio": round(with_loads / without, 3),
        "spread": round(max(times[0.0][2:]) / min(times[0.0][2:]), 2), "load_average": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def main() -> None:
    """Run what was asked for: the digits by default, for a run of stdlib-text takes three to eight minutes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--scenarios", nargs="*", default=["digits"])
    parser.add_argument("--routers", nargs="+", default=list(ROUTERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--repeats", type=int, default=61)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for row in _rows(options):
        text = json.dumps(row) if options.json else "  ".join(f"{key} {value}" for key, value in row.items())
        print(text, flush=True)


def _rows(options: argparse.Namespace) -> Iterable[Row]:
    for name in EXAMPLES:
        yield overhead(name, options.repeats)
    for name in options.scenarios:
        for router in options.routers:
            for seed in options.seeds:
                for on in (False, True):
                    yield balance(name, router, seed, on=on)


if __name__ == "__main__":
    main()
