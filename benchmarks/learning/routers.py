"""Whether routers find a planted partition, how evenly they load experts, and what they cost.

* ``planted``: see planted_partition.py. Normalised mutual information between cluster and best expert, the busiest
  expert's load over the mean, and accuracy, all held out; means over seeds with the worst one, with balancing (a
  per-example loss, and ``moved_bias`` for routers with a selection bias) and without.
* ``step``: seconds of a forward and backward pass of one MoE layer, and their ratio to a dense feed-forward layer as
  wide as the active experts together. A policy's row is one rollout; ``top-p`` has mass 1, so that it uses as many
  experts as the others. Methods are interleaved in one process, medians after two warm-ups, one thread. ``spread`` is
  the slowest run over the fastest: far above 1.3, the machine was not quiet.

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
from planted_partition import ROUTERS, Outcome, run
from torch import nn

from conclave.model.experts.config import ExpertsConfig
from conclave.model.experts.moe import MoELayer
from conclave.model.experts.stacked import SharedExpert

Row = dict[str, object]


def planted(seeds: int) -> Iterable[Row]:
    """Train every router on every seed, balanced and not."""
    for name, router in ROUTERS.items():
        for balanced in (True, False):
            found = [run(router, seed, balanced=balanced) for seed in range(seeds)]
            mean = Outcome(*(statistics.mean(values) for values in zip(*found, strict=True)))
            yield {
                "measure": "planted", "router": name, "balanced": balanced, "seeds": seeds,
                "information": round(mean.information, 3),
                "information_worst": round(min(o.information for o in found), 3),
                "imbalance": round(mean.imbalance, 2),
                "imbalance_worst": round(max(o.imbalance for o in found), 2),
                "accuracy": round(mean.accuracy, 3),
                "experts": round(mean.experts, 2),
            }  # fmt: skip


def make_layers(width: int, hidden: int, experts: int, top_k: int) -> dict[str, nn.Module]:
    """A dense layer of the active size, and an MoE layer per router."""
    shape = {"routed": experts, "hidden": hidden, "top_k": top_k}
    layers: dict[str, nn.Module] = {
        "dense": SharedExpert(ExpertsConfig.model_validate(shape | {"shared": top_k}), width)
    }
    for name, router in ROUTERS.items():
        options = dict(router) | ({"mass": 1.0} if name == "top-p" else {})
        config = ExpertsConfig.model_validate(shape | {"router": options})
        layers[name] = MoELayer(config, range(experts), width)
    for layer in layers.values():
        for weight in layer.parameters():
            nn.init.normal_(weight, 0.0, 0.05)
    return layers


def step(layer: nn.Module, x: torch.Tensor) -> None:
    """One forward and backward pass."""
    x = x.detach().requires_grad_()
    if isinstance(layer, MoELayer):
        y, routing = layer(x, torch.ones(layer.held, dtype=torch.bool))
        loss = y.square().mean() + routing.aux_B.mean()
        if routing.log_prob_B is not None:
            loss = loss + routing.log_prob_B.mean()
    else:
        loss = layer(x).square().mean()
    loss.backward()


def steps(examples: int, tokens: int, width: int, hidden: int, experts: int, top_k: int, repeats: int) -> Iterable[Row]:
    """Time all layers, interleaved."""
    layers, x = make_layers(width, hidden, experts, top_k), torch.randn(examples, tokens, width)
    times: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(repeats + 2):
        for name, layer in layers.items():
            layer.zero_grad()
            started = time.perf_counter()
            step(layer, x)
            times[name].append(time.perf_counter() - started)
    seconds = {name: statistics.median(runs[2:]) for name, runs in times.items()}
    for name, runs in times.items():
        yield {
            "measure": "step", "router": name, "examples": examples, "tokens": tokens, "width": width,
            "hidden": hidden, "experts": experts, "top_k": top_k, "seconds": round(seconds[name], 5),
            "ratio": round(seconds[name] / seconds["dense"], 2), "spread": round(max(runs[2:]) / min(runs[2:]), 2),
            "load_average": round(os.getloadavg()[0], 2),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for rows in (
        planted(options.seeds),
        steps(32, 64, 128, 256, 8, 2, options.repeats),
        steps(16, 64, 256, 512, 16, 2, options.repeats),
    ):
        for row in rows:
            print(json.dumps(row) if options.json else row, flush=True)


if __name__ == "__main__":
    main()
