"""What moving a round's messages between processes costs: our worker pool, and two executors that are libraries.

A round is a broadcast of all tensors to a cohort of nodes, and a reply of as many tensors from each. A node itself does
next to nothing, so that what is left is the way there and back. Every side runs the same ClientApp on the same messages
in as many processes with one thread each, and adds up the replies as they come.

``pool`` is ours. ``executor`` is ``concurrent.futures.ProcessPoolExecutor``; ``loky`` is a sturdier one that comes with
joblib: both pickle a message with its tensors packed. ``shared`` is the executor with ``torch.multiprocessing``:
tensors lie in shared memory, the broadcast once for the whole round, and what is pickled are handles. ``flat`` is the
same with all tensors of a message in one, so that there is one handle. Ours pickles nothing, as nothing in the product
may; what is measured is whether that costs anything.

Rounds of all sides are interleaved. ``seconds`` are a median; ``cpu_seconds`` a mean over rounds, of all processes of a
side together; ``ratio`` and ``cpu_ratio`` are to ``pool``. One JSON object a line with --json. Needs /proc.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path

import torch
import torch.multiprocessing  # tensors are pickled as handles from here on, where multiprocessing pickles
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from joblib.externals.loky import ProcessPoolExecutor as Loky
from torch import Size, Tensor

from conclave.protocol.codec import array_of, decode, encode, tensors_of
from conclave.protocol.messages import TRAIN, TrainReply
from conclave.server.replies.receipts import EMPTY_RECEIPT
from conclave.simulations.engines.frames import content_of, document_of
from conclave.simulations.engines.inline import InlineGrid
from conclave.simulations.engines.worker_pool import WorkerPool

NODES = 64
SIZES = {  # how many tensors, of how many values each, to how many nodes a round
    "0.04M in 20": (20, 2_000, 50),
    "0.2M in 4": (4, 50_000, 50),
    "1.6M in 8": (8, 200_000, 10),
    "12M in 150": (150, 80_000, 4),
}
REPLY = TrainReply(charge_id="0" * 64, receipt=EMPTY_RECEIPT)
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
"""As our pool sets it for its workers; the others get it too."""
Round = Callable[[RecordDict, str, list[int]], Iterator[RecordDict]]
"""(what is sent to all, the size, nodes) → contents of the replies."""

app = ClientApp()


def shapes_of(size: str) -> dict[str, Size]:
    tensors, values, _ = SIZES[size]
    return {f"shared/{number:03d}": Size([values]) for number in range(tensors)}


@app.train()
def answer(message: Message, context: Context) -> Message:
    """Send back what came, plus the node's number."""
    tensors = tensors_of(message.content, shapes_of(message.metadata.group_id))
    number = float(context.node_config["partition-id"])
    return Message(encode(REPLY, {name: tensor + number for name, tensor in tensors.items()}), reply_to=message)


def one_thread() -> None:
    """Begin a worker of an executor; it needs a grid's private touches to make messages."""
    torch.set_num_threads(1)
    own_grid()


@cache
def own_grid() -> InlineGrid:
    return grid()


def grid(pool: WorkerPool | None = None) -> InlineGrid:
    return InlineGrid(app, NODES, 1, {}, lambda reply: None, pool)


def requests(content: RecordDict, size: str, nodes: list[int], to: InlineGrid) -> list[Message]:
    ids = to.get_node_ids()
    return [Message(content, ids[node], TRAIN, group_id=size) for node in nodes]


def answered(message: Message) -> Message:
    """Run the ClientApp in a worker; the message came whole."""
    number = message.metadata.dst_node_id - own_grid().get_node_ids()[0]
    return app(message, Context(1, message.metadata.dst_node_id, {"partition-id": number}, RecordDict(), {}))


def answered_in_parts(
    size: str, node: int, document: str | None, tensors: dict[str, Tensor]
) -> tuple[str | None, dict[str, Tensor]]:
    """Run the ClientApp in a worker; document and tensors came side by side."""
    (message,) = requests(content_of(document, tensors), size, [node], own_grid())
    content = answered(message).content
    return document_of(content), {name: tensor.share_memory_() for name, tensor in array_of(content).tensors.items()}


def flattened(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat(list(tensors.values())).share_memory_()


def in_parts(size: str, flat: Tensor) -> dict[str, Tensor]:
    shapes = shapes_of(size)
    return dict(zip(shapes, flat.split([shape.numel() for shape in shapes.values()]), strict=True))


def answered_flat(size: str, node: int, document: str | None, flat: Tensor) -> tuple[str | None, Tensor]:
    """As :func:`answered_in_parts`, in one tensor."""
    (message,) = requests(content_of(document, in_parts(size, flat)), size, [node], own_grid())
    content = answered(message).content
    return document_of(content), flattened(array_of(content).tensors)


def by_pool(side: InlineGrid, content: RecordDict, size: str, nodes: list[int]) -> Iterator[RecordDict]:
    return (reply.content for reply in side.send_and_receive(requests(content, size, nodes, side)))


def by_executor(executor: Executor, content: RecordDict, size: str, nodes: list[int]) -> Iterator[RecordDict]:
    waiting = [executor.submit(answered, message) for message in requests(content, size, nodes, own_grid())]
    return (done.result().content for done in as_completed(waiting))


def by_shared(executor: Executor, content: RecordDict, size: str, nodes: list[int]) -> Iterator[RecordDict]:
    tensors = {name: tensor.share_memory_() for name, tensor in array_of(content).tensors.items()}
    document = document_of(content)
    waiting = [executor.submit(answered_in_parts, size, node, document, tensors) for node in nodes]
    return (content_of(*done.result()) for done in as_completed(waiting))


def by_flat(executor: Executor, content: RecordDict, size: str, nodes: list[int]) -> Iterator[RecordDict]:
    document, flat = document_of(content), flattened(array_of(content).tensors)
    for done in as_completed([executor.submit(answered_flat, size, node, document, flat) for node in nodes]):
        text, replied = done.result()
        yield content_of(text, in_parts(size, replied))


def cpu_seconds(processes: Iterable[int]) -> float:
    """Of this process and others, all their threads."""
    ticks = 0
    for number in processes:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(") ")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def sides(workers: int, stack: ExitStack) -> dict[str, tuple[Round, list[int]]]:
    """Start every side; return what runs a round and the ids of its processes."""
    pool = stack.enter_context(WorkerPool(workers, "engine_pool:app", run_id=1, nodes=NODES, run_config={}))
    found: dict[str, tuple[Round, list[int]]] = {
        "pool": (partial(by_pool, grid(pool)), [worker.process.pid for worker in pool._workers])
    }
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads may hang
    for name, way in (("executor", by_executor), ("shared", by_shared), ("flat", by_flat)):
        executor = stack.enter_context(ProcessPoolExecutor(workers, mp_context=spawn, initializer=one_thread))
        found[name] = (partial(way, executor), started(executor, workers))
    executor = stack.enter_context(Loky(workers, timeout=None, initializer=one_thread))
    found["loky"] = (partial(by_executor, executor), started(executor, workers))
    return found


def started(executor: Executor, workers: int) -> list[int]:
    """Start all processes of an executor; return their ids."""
    for done in [executor.submit(time.sleep, 1.0) for _ in range(workers)]:
        done.result()
    ids = [int(number) for number in executor._processes]  # type: ignore[attr-defined]  # there is no other way
    assert len(ids) == workers
    return ids


def measure(size: str, rounds: int, found: dict[str, tuple[Round, list[int]]]) -> Iterator[dict[str, object]]:
    tensors, values, cohort = SIZES[size]
    seconds: dict[str, list[float]] = {name: [] for name in found}
    cpu: dict[str, list[float]] = {name: [] for name in found}
    for number in range(rounds + 2):
        results = []
        for name, (run, processes) in found.items():
            # Contents are made anew: what an earlier side packed or moved is no gift to the next one.
            sent = {key: torch.full(shape, float(number)) for key, shape in shapes_of(size).items()}
            began, spent = time.perf_counter(), cpu_seconds(processes)
            total = {key: torch.zeros(shape) for key, shape in shapes_of(size).items()}
            for content in run(encode(REPLY, sent), size, [(7 * node + number) % NODES for node in range(cohort)]):
                decode(content, TrainReply)
                for key, tensor in tensors_of(content, shapes_of(size)).items():
                    total[key].add_(tensor)
            seconds[name].append(time.perf_counter() - began)
            cpu[name].append(cpu_seconds(processes) - spent)
            results.append(total)
        if any(not torch.equal(result[key], results[0][key]) for result in results for key in result):
            raise SystemExit(f"{size}: the sides brought different replies")  # whole numbers: any order adds up alike
    median = {name: statistics.median(times[2:]) for name, times in seconds.items()}  # two rounds of warm-up
    mean = {name: statistics.fmean(times[2:]) for name, times in cpu.items()}
    for name in found:
        yield {
            "size": size,
            "tensors": tensors,
            "parameters": tensors * values,
            "nodes": cohort,
            "side": name,
            "seconds": round(median[name], 4),
            "ratio": round(median[name] / median["pool"], 2),
            "cpu_seconds": round(mean[name], 4),
            "cpu_ratio": round(mean[name] / mean["pool"], 2),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    here = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    os.environ.update(MALLOC | {"OMP_NUM_THREADS": "1"})
    with ExitStack() as stack:
        found = sides(options.workers, stack)
        for size in SIZES:
            for row in measure(size, options.rounds, found):
                print(json.dumps(row) if options.json else row, flush=True)


if __name__ == "__main__":
    import engine_pool  # under the name by which worker processes import it

    engine_pool.main()
