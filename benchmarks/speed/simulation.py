"""What a federated simulation costs beside a bare torch loop that does the same steps.

Plain training, no privacy: an engine has nothing to hide behind. Both sides train the same model on the same
records with the same steps, and average the same way. The federated side goes through the whole of Conclave's
path: typed messages, packing, a Flower ClientApp, validation of replies, aggregation per tensor, server optimizer.

Rounds of all sides are interleaved in one process; ratios are of medians. One JSON object a line with --json: model,
engine, workers, threads, seconds, and ``ratio`` to the bare loop. Bare loop and one worker each run with 1 and with 2
threads, and the faster counts; more workers have one thread each. ``ratio_1_thread`` is to the bare loop with one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from conclave.protocol.codec import decode, encode, tensors_of
from conclave.protocol.messages import TRAIN, TrainReply
from conclave.server.aggregate.aggregation import Averager, WeightedDelta
from conclave.server.aggregate.config import ServerSgd
from conclave.server.aggregate.optimizer import ServerOptimizer
from conclave.server.replies.receipts import EMPTY_RECEIPT
from conclave.simulations.engines.inline import InlineGrid
from conclave.simulations.engines.worker_pool import WorkerPool

RECORDS, BATCH, RATE = 50, 10, 0.05


@dataclass(frozen=True)
class Setting:
    """A model, its records' shape, and the size of the federation."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    nodes: int
    cohort: int


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 10))


def cnn() -> nn.Module:
    """1.6 M parameters on 28×28 images, the usual federated EMNIST network with 5×5 kernels."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 10),
    )  # fmt: skip


SETTINGS = {
    "mlp": Setting(mlp, (3072,), nodes=1000, cohort=50),
    "cnn": Setting(cnn, (1, 28, 28), nodes=1000, cohort=10),
}


@cache
def records(name: str) -> tuple[Tensor, Tensor]:
    """The pool of records; node i uses a window of it. Contents do not matter to time."""
    generator = torch.Generator().manual_seed(0)
    pool = 2000
    return (
        torch.randn(pool + RECORDS, *SETTINGS[name].shape, generator=generator),
        torch.randint(10, (pool + RECORDS,), generator=generator),
    )


@cache
def module(name: str) -> nn.Module:
    """The model, built once."""
    return SETTINGS[name].build()


def train(name: str, node: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Local training: one epoch of SGD from the given weights; return after minus before."""
    model = module(name)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(tensors[parameter_name])
    x, y = records(name)
    start = (node * 37) % 2000
    parameters = list(model.parameters())
    for first in range(start, start + RECORDS, BATCH):
        loss = nn.functional.cross_entropy(model(x[first : first + BATCH]), y[first : first + BATCH])
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            torch._foreach_add_(parameters, gradients, alpha=-RATE)
    with torch.no_grad():
        return {n: p - tensors[n] for n, p in model.named_parameters()}


def cohort(name: str, round_number: int) -> list[int]:
    setting = SETTINGS[name]
    return [(round_number * 131 + 7 * i) % setting.nodes for i in range(setting.cohort)]


def bare_round(name: str, tensors: dict[str, Tensor], round_number: int) -> None:
    """One round without any federation: train, add up, apply."""
    chosen = cohort(name, round_number)
    total = {n: torch.zeros_like(t) for n, t in tensors.items()}
    for node in chosen:
        for n, delta in train(name, node, tensors).items():
            total[n].add_(delta, alpha=1.0 / len(chosen))
    for n, tensor in tensors.items():
        tensor.add_(total[n])


def client_app(name: str) -> ClientApp:
    """A plain ClientApp on Conclave's messages."""
    app = ClientApp()
    shapes = {f"shared/{n}": p.shape for n, p in module(name).named_parameters()}

    @app.train()
    def handle(message: Message, context: Context) -> Message:
        received = tensors_of(message.content, shapes)
        tensors = {n.removeprefix("shared/"): t for n, t in received.items()}
        delta = train(name, int(context.node_config["partition-id"]), tensors)
        wire = {f"shared/{n}": t for n, t in delta.items()}
        return Message(encode(TrainReply(charge_id="0" * 64, receipt=EMPTY_RECEIPT), wire), reply_to=message)

    return app


def federated_round(name: str, grid: InlineGrid, optimizer: ServerOptimizer, round_number: int) -> None:
    """One round through messages, validation, aggregation and the server optimizer."""
    tensors = optimizer.snapshot()
    shapes = {n: t.shape for n, t in tensors.items()}
    content = encode(TrainReply(charge_id="0" * 64, receipt=EMPTY_RECEIPT), tensors)  # one broadcast for all
    ids = list(grid.get_node_ids())
    requests = [Message(content, ids[node], TRAIN, group_id=str(round_number)) for node in cohort(name, round_number)]
    averager = Averager([str(request.metadata.dst_node_id) for request in requests])
    for reply in grid.send_and_receive(requests):
        decode(reply.content, TrainReply)
        node = str(reply.metadata.src_node_id)
        averager.add(node, WeightedDelta(node, 1.0, tensors_of(reply.content, shapes)))
    optimizer.step(averager.result(1), 1.0)


mlp_app = client_app("mlp")
cnn_app = client_app("cnn")
"""Named at module level so that worker processes can import them."""


def measure(name: str, rounds: int, workers: int) -> Iterable[dict[str, object]]:
    """Time bare rounds with 1 and 2 threads and federated rounds in this process and in workers, interleaved."""
    nodes = SETTINGS[name].nodes
    with WorkerPool(workers, f"simulation:{name}_app", run_id=1, nodes=nodes, run_config={}) as pool:
        yield from _measure(name, rounds, workers, pool)


def _measure(name: str, rounds: int, workers: int, pool: WorkerPool) -> Iterable[dict[str, object]]:
    initial = {n: p.detach().clone() for n, p in module(name).named_parameters()}
    bare = {n: t.clone() for n, t in initial.items()}
    optimizer = ServerOptimizer(ServerSgd(), {f"shared/{n}": t for n, t in initial.items()})
    threaded = ServerOptimizer(ServerSgd(), {f"shared/{n}": t for n, t in initial.items()})
    twin = ServerOptimizer(ServerSgd(), {f"shared/{n}": t for n, t in initial.items()})
    grid = InlineGrid(client_app(name), SETTINGS[name].nodes, 1, {}, lambda reply: None)
    pooled = InlineGrid(client_app(name), SETTINGS[name].nodes, 1, {}, lambda reply: None, pool)
    times: dict[str, list[float]] = {"bare1": [], "bare2": [], "inline1": [], "inline2": [], "pooled": []}

    def timed(label: str, threads: int, work: Callable[[], None]) -> None:
        torch.set_num_threads(threads)
        started = time.perf_counter()
        work()
        times[label].append(time.perf_counter() - started)

    for number in range(rounds + 2):
        timed("bare1", 1, lambda number=number: bare_round(name, bare, number))
        timed("inline1", 1, lambda number=number: federated_round(name, grid, optimizer, number))
        timed("inline2", 2, lambda number=number: federated_round(name, grid, threaded, number))
        timed("pooled", 1, lambda number=number: federated_round(name, pooled, twin, number))
        timed("bare2", 2, lambda number=number: bare_round(name, {n: t.clone() for n, t in initial.items()}, number))
    median = {label: statistics.median(values[2:]) for label, values in times.items()}  # two rounds of warm-up
    for side in (optimizer, threaded, twin):
        drift = max(float((side.snapshot()[f"shared/{n}"] - t).abs().max()) for n, t in bare.items())
        if drift > 1e-2:
            raise SystemExit(f"{name}: the sides trained different models (difference {drift:g})")
    fastest = min(median["bare1"], median["bare2"])
    common = {"bare_seconds_1_thread": round(median["bare1"], 4), "bare_seconds_2_threads": round(median["bare2"], 4)}
    one_worker = min(("inline1", "inline2"), key=median.__getitem__)  # the same choice that the bare loop has
    for label, processes, threads in ((one_worker, 1, int(one_worker[-1])), ("pooled", workers, 1)):
        yield {
            "model": name,
            "engine": "inline",
            "workers": processes,
            "threads": threads,
            "seconds": round(median[label], 4),
            "ratio": round(median[label] / fastest, 3),
            "ratio_1_thread": round(median["inline1" if processes == 1 else "pooled"] / median["bare1"], 3),
            **common,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    here = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    for name in SETTINGS:
        for row in measure(name, options.rounds, options.workers):
            print(json.dumps(row) if options.json else row)


if __name__ == "__main__":
    main()
