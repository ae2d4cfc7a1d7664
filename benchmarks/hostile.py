"""Accuracy of `digits` with one hostile node of ten, kind by kind, against the run in which it is honest.

The hostile node is charged like the others; what it sends is spoiled on its way. Its kinds: what the checks of replies
catch (nan, wrong shape, unassigned expert, over the norm, replay, garbage), and what no check can (its delta times −10,
or the same step in every coordinate, ten times as long as its delta; both cut to the norm bound). `absent` refuses: its
records are lost, whatever is done about it. One JSON object a line with --json.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from flwr.app import Context, Message, RecordDict
from safetensors.torch import load
from torch import Tensor

import clients.app
from clients.protocol import TRAIN, Plan, Refusal, TrainReply, TrainRequest, body_of, decode, encode, norms, pack
from data.shipped_scenarios import find
from server.app import run_scenario
from server.metrics import dropped_by
from server.run_directory import RunDirectory
from server.scenario import read_scenario
from server.validation import norm_bound
from simulations.inline_engine import InlineGrid
from simulations.simulate import run_number

Delta = dict[str, Tensor]
HOSTILE = 3
"""The number of the hostile node, one of about the mean size."""


def first_of(delta: Delta, group: str, change: Callable[[Tensor], Tensor]) -> Delta:
    name = next(n for n in sorted(delta) if n.startswith(group))
    return delta | {name: change(delta[name])}


def unassigned(delta: Delta, request: TrainRequest) -> Delta:
    mine = request.held[0][0]
    other = next(e for e in range(request.plan.model.experts.routed) if e not in request.held[0])
    return {n.replace(f"/0/{mine}/", f"/0/{other}/"): t for n, t in delta.items()}


def as_long_as_may_be(direction: Delta, honest: Delta, plan: Plan, size: int, round_number: int) -> Delta:
    """Scale a direction to ten times the honest delta's norm, or to just below the bound if that is less."""
    count = sum(t.numel() for t in honest.values())
    norm = min(10.0 * math.hypot(*norms(honest)), 0.999 * norm_bound(plan, count, size, round_number))
    factor = norm / math.hypot(*norms(direction))
    return {n: factor * t for n, t in direction.items()}


class Federation:
    """The ClientApp of a federation in which one node is hostile in one way; ``none`` is honest."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.first: RecordDict | None = None

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer as Conclave's ClientApp, but for the hostile node."""
        reply = clients.app.app(message, context)
        if message.metadata.message_type == TRAIN and context.node_config["partition-id"] == HOSTILE:
            size = clients.app.open_node(context).declared_size
            reply.content = self._spoil(decode(message.content, TrainRequest), reply.content, size)
        return reply

    def _spoil(self, request: TrainRequest, content: RecordDict, size: int) -> RecordDict:
        answer, delta = decode(content, TrainReply), load(body_of(content))
        if self.kind == "none":
            return content
        if self.kind == "absent":
            return encode(Refusal(code="not-allowed"))
        if self.kind == "garbage":
            return encode(answer, bytes(range(256)) * 64)
        if self.kind == "replay":
            self.first = self.first or content
            return self.first

        def in_bound(direction: Delta) -> Delta:
            return as_long_as_may_be(direction, delta, request.plan, size, request.round)

        spoiled = {
            "nan": lambda: first_of(delta, "shared/", lambda t: t * math.nan),
            "wrong-shape": lambda: first_of(delta, "expert/", torch.flatten),
            "unassigned-expert": lambda: unassigned(delta, request),
            "over-norm": lambda: {n: 1e4 * t for n, t in delta.items()},
            "sign-flip": lambda: in_bound({n: -t for n, t in delta.items()}),
            "constant": lambda: in_bound({n: torch.ones_like(t) for n, t in delta.items()}),
        }[self.kind]()
        return encode(answer, pack(spoiled))


CAUGHT = ("absent", "nan", "wrong-shape", "unassigned-expert", "over-norm", "replay", "garbage")
IN_BOUND = ("sign-flip", "constant")
AGGREGATIONS: dict[str, dict[str, object]] = {
    "mean": {"kind": "mean"},
    "trimmed-mean": {"kind": "trimmed-mean", "trim": 0.1},
    "median": {"kind": "median"},
    "norm-bounded": {"kind": "norm-bounded", "bound": 1.0},
}


def measure(name: str, kind: str, aggregation: str, rounds: int, seed: int) -> dict[str, object]:
    changes = {"seed": seed, "federation.aggregation": AGGREGATIONS[aggregation], "federation.rounds": rounds}
    scenario = read_scenario(find(name), changes)
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory.create(scenario, Path(folder) / "run")
        config = {"scenario": scenario.to_toml(), "run-dir": str(run.path)}
        number = run_number(scenario)
        app: Callable[[Message, Context], Message] = Federation(kind)
        grid = InlineGrid(app, scenario.partition.nodes, number, config, lambda reply: None)  # type: ignore[arg-type]
        run_scenario(grid, scenario, run, str(number))
        metrics = run.metrics()
    return {
        "scenario": name,
        "hostile": kind,
        "aggregation": aggregation,
        "seed": seed,
        "accuracy": round(metrics[-1]["accuracy"], 4),
        "dropped_by": dropped_by(metrics),
        "seconds_a_round": round(sorted(line["seconds"] for line in metrics)[len(metrics) // 2], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--scenario", choices=("digits", "digits-open"), default="digits")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in range(1, options.seeds + 1):
        pairs = [("none", name) for name in AGGREGATIONS]
        if options.scenario == "digits":  # without privacy there is no bound to be over
            pairs += [(kind, "mean") for kind in CAUGHT]
        pairs += [(kind, name) for kind in IN_BOUND for name in AGGREGATIONS]
        baseline: object = None
        for kind, name in pairs:
            row = measure(options.scenario, kind, name, options.rounds, seed)
            baseline = row["accuracy"] if baseline is None else baseline
            row["points_lost"] = round(100 * (baseline - row["accuracy"]), 2)  # type: ignore[operator]
            print(json.dumps(row) if options.json else row, flush=True)


if __name__ == "__main__":
    main()
