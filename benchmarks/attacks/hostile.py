"""Accuracy of `digits` with one hostile node of ten, kind by kind, against the run in which it is honest.

The hostile node is charged like the others; what it sends is spoiled on its way. Its kinds: what the checks of replies
always catch (nan, wrong shape, unassigned expert, over the norm, replay, garbage); lies within the norm bound (its
delta times −10, or the same step in every coordinate, ten times as long as its delta; both cut to the bound), without
and with `federation.noise_test`; the first honest delta again every round; and lies made to pass that test
(:mod:`lies`). `absent` refuses: its records are lost, whatever is done about it. `harm` is how far an adaptive liar's
median delta goes in its direction, in units of a coordinate's noise. One JSON object a line with --json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from flwr.app import Context, Message, RecordDict
from lies import AdaptiveLiar, Delta, as_long_as_may_be, first_of, unassigned
from safetensors.torch import load

import conclave.simulations.client_app
from conclave.data.sources import load as load_data
from conclave.model.records import Records
from conclave.protocol.codec import body_of, decode, encode, unpack
from conclave.protocol.messages import TRAIN, Refusal, TrainReply, TrainRequest
from conclave.protocol.tensor_array import pack
from conclave.server.metrics import dropped_by
from conclave.server.run import run_scenario
from conclave.server.run_directory import RunDirectory
from conclave.server.scenario import read_scenario
from conclave.simulations.engines.inline import InlineGrid
from conclave.simulations.shipped import find
from conclave.simulations.simulate import run_number

HOSTILE = 3
"""The number of the hostile node, one of about the mean size."""


class Federation:
    """The ClientApp of a federation in which one node is hostile in one way; ``none`` is honest."""

    def __init__(self, kind: str, liar: AdaptiveLiar | None = None) -> None:
        self.kind, self._liar = kind, liar
        self.first: RecordDict | None = None
        self._noise: Delta = {}

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer as Conclave's ClientApp, but for the hostile node."""
        reply = conclave.simulations.client_app.app(message, context)
        if message.metadata.message_type == TRAIN and context.node_config["partition-id"] == HOSTILE:
            node = conclave.simulations.client_app.open_node(context)
            reply.content = self._spoil(message.content, reply.content, node.declared_size, node.records)
        return reply

    def _spoil(self, asked: RecordDict, content: RecordDict, size: int, own: Records) -> RecordDict:
        request = decode(asked, TrainRequest)
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
        if self.kind == "same-noise":
            self._noise = delta | self._noise
            return encode(answer, pack({name: self._noise[name] for name in delta}))
        if self._liar is not None:
            weights = unpack(body_of(asked), request.plan.travelling(request.held))
            lie = self._liar.lie(request, weights, size, own)
            return encode(Refusal(code="not-allowed")) if lie is None else encode(answer, pack(lie))

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


def measure(
    name: str,
    kind: str,
    aggregation: str,
    rounds: int,
    seed: int,
    *,
    signal: float | None = None,
    across_rounds: bool = True,
) -> dict[str, object]:
    """Run it; ``signal`` turns the noise test on."""
    changes = {"seed": seed, "federation.aggregation": AGGREGATIONS[aggregation], "federation.rounds": rounds}
    if signal is not None:
        changes["federation.noise_test"] = {"signal": signal, "across_rounds": across_rounds}
    scenario = read_scenario(find(name), changes)
    liar = None
    if kind in AdaptiveLiar.KINDS and scenario.federation.noise_test is not None:
        liar = AdaptiveLiar(kind, scenario.federation.noise_test, load_data(scenario.data).train)
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory.create(scenario, Path(folder) / "run")
        config = {"scenario": scenario.to_toml(), "run-dir": str(run.path)}
        number = run_number(scenario)
        app: Callable[[Message, Context], Message] = Federation(kind, liar)
        grid = InlineGrid(app, scenario.partition.nodes, number, config, lambda reply: None)  # type: ignore[arg-type]
        run_scenario(grid, scenario, run, str(number))
        metrics = run.metrics()
    return {
        "scenario": name,
        "hostile": kind,
        "aggregation": aggregation,
        "noise_test": signal,
        "seed": seed,
        "accuracy": round(metrics[-1]["accuracy"], 4),
        "dropped_by": dropped_by(metrics),
        "seconds_a_round": round(sorted(line["seconds"] for line in metrics)[len(metrics) // 2], 3),
        **({"harm": round(statistics.median(liar.harm), 1), "lies": len(liar.harm)} if liar and liar.harm else {}),
    }


def rows(scenario: str, signal: float) -> Iterator[tuple[str, str, float | None]]:
    """Yield hostile kind, aggregation and the noise test's signal (None: without it) of every row."""
    for name in AGGREGATIONS:
        yield "none", name, None
    if scenario == "digits-open":  # without privacy there is no bound to be over, and no noise to look like
        yield "absent", "mean", None
    else:
        for kind in CAUGHT:
            yield kind, "mean", None
        for kind in ("none", "absent", *IN_BOUND, "same-noise"):
            yield kind, "mean", signal
        for kind in AdaptiveLiar.KINDS:
            for name in AGGREGATIONS:
                yield kind, name, signal
    for kind in IN_BOUND:
        for name in AGGREGATIONS:
            yield kind, name, None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--scenario", choices=("digits", "digits-open"), default="digits")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--signal", type=float, default=1.0, help="of the noise test, where it is on")
    parser.add_argument("--one-by-one", action="store_true", help="the noise test forgets earlier rounds")
    parser.add_argument("--aggregations", nargs="*", default=list(AGGREGATIONS), help="all if left out")
    parser.add_argument("--only", nargs="*", default=(), help="hostile kinds; all if left out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in range(1, options.seeds + 1):
        baseline: object = None
        for kind, name, signal in rows(options.scenario, options.signal):
            if (options.only and kind not in options.only) or name not in options.aggregations:
                continue
            row = measure(
                options.scenario, kind, name, options.rounds, seed, signal=signal, across_rounds=not options.one_by_one
            )
            baseline = row["accuracy"] if baseline is None else baseline
            row["points_lost"] = round(100 * (baseline - row["accuracy"]), 2)  # type: ignore[operator]
            print(json.dumps(row) if options.json else row, flush=True)


if __name__ == "__main__":
    main()
