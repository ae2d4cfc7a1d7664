"""Bytes, accuracy and time of each encoding of the deltas: the scenario `digits`, and a million values.

One JSON object a line with --json. A seed's noise follows from the plan and from the weights of every round, so each
encoding draws its own. The rows of equal noise round the deltas of one plan, the noise fixed: they show rounding alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Size, Tensor
from whole_run import whole_run

import conclave.clients.node
from conclave.clients.trainer import Trained, train
from conclave.privacy.randomness import derive, standard_normal
from conclave.protocol.encodings import Encoding, encodings_of, wire_form
from conclave.server.scenario import read_scenario
from conclave.simulations.shipped import find

ENCODINGS: tuple[Encoding, ...] = ("fp32", "bf16", "int8")
SHAPES = {f"expert/0/{number}/up.weight": Size([100, 100]) for number in range(100)}


@contextmanager
def rounded_in_equal_noise(encoding: Encoding) -> Iterator[None]:
    """Round deltas after training and send what they decode to; the n-th training of a run has the n-th secret."""
    number = itertools.count()

    def train_and_round(*arguments: Any, **options: Any) -> Trained:
        secret = derive(bytes(32), "paired", arguments[0].model_dump_json(), next(number))
        trained = train(*arguments[:5], secret, **options)
        shapes = {name: tensor.shape for name, tensor in trained.delta.items()}
        form = wire_form(shapes, encodings_of(encoding, shapes))
        sent = form.encode(trained.delta, derive(secret, "encoding"))
        return replace(trained, delta=form.decode(sent))

    with mock.patch.object(conclave.clients.node, "train", train_and_round):
        yield


def run(seed: int, changes: dict[str, object]) -> dict[str, float]:
    scenario = read_scenario(find("digits"), {"seed": seed} | changes)
    summary, metrics, seconds = whole_run(scenario)
    last = metrics[-1]
    up, down = last["bytes_up_per_node"], last["bytes_down_per_node"]
    return {"accuracy": summary.accuracy, "bytes_up": up, "bytes_down": down, "seconds": seconds}


def digits(name: str, seeds: int, changes: dict[str, object], rounding: Encoding | None = None) -> dict[str, object]:
    runs = []
    for seed in range(1, seeds + 1):
        with nullcontext() if rounding is None else rounded_in_equal_noise(rounding):
            runs.append(run(seed, changes))
    return {
        "digits": name,
        "accuracy": [round(result["accuracy"], 4) for result in runs],
        "mean": round(statistics.mean(result["accuracy"] for result in runs), 4),
        "bytes_up": round(runs[0]["bytes_up"]),
        "bytes_down": round(runs[0]["bytes_down"]),
        "seconds": round(statistics.median(result["seconds"] for result in runs), 2),
    }


def milliseconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(31):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return round(statistics.median(times) * 1e3, 2)


def a_million(encoding: Encoding) -> dict[str, object]:
    tensors: dict[str, Tensor] = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    form = wire_form(SHAPES, encodings_of(encoding, SHAPES))
    sent = form.encode(tensors, bytes(32))
    return {
        "a million values": encoding,
        "encode_ms": milliseconds(lambda: form.encode(tensors, bytes(32))),
        "decode_ms": milliseconds(lambda: form.decode(sent)),
        "noise_ms": milliseconds(lambda: standard_normal(bytes(32), 1_000_000)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = (
        *(lambda e=e: a_million(e) for e in ENCODINGS),
        *(lambda e=e: digits(e, options.seeds, {"traffic.delta": e}) for e in ENCODINGS),
        lambda: digits("int8, model bf16", options.seeds, {"traffic.delta": "int8", "traffic.model": "bf16"}),
        *(lambda e=e: digits(f"{e}, equal noise", options.seeds, {}, e) for e in ENCODINGS),
    )
    for row in rows:
        found = row()
        print(json.dumps(found) if options.json else found, flush=True)


if __name__ == "__main__":
    main()
