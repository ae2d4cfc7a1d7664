"""Worker processes: the same results as in process, whatever their number."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pool_app
import pytest
import torch
from conftest import in_the_soak_unless, make_reply
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from run_samples import events, events_of

from conclave.audit.run import audit_run
from conclave.protocol.codec import decode, encode, tensors_of
from conclave.protocol.messages import TRAIN, TrainReply
from conclave.server.run_directory import RunDirectory
from conclave.server.scenario import read_scenario
from conclave.simulations.engines.frames import Frame
from conclave.simulations.engines.inline import InlineGrid
from conclave.simulations.engines.shared_slots import SlotReader, SlotWriter, anonymous_file
from conclave.simulations.engines.worker import Worker
from conclave.simulations.engines.worker_pool import WorkerPool
from conclave.simulations.shipped import find
from conclave.simulations.simulate import simulate

EVERYTHING = {
    "federation.rounds": 4,
    "partition.nodes": 4,
    "model.width": 8,
    "model.experts.hidden": 8,
    "model.experts.router": {"kind": "sigmoid"},
    "federation.assignment": "affinity",
    "affinity": {"epsilon": 0.3, "every": 2},
    "federation.expert_scope": "mixed",
    "federation.local_experts": 4,
    "balancing": {"share": 0.05, "rate": 0.01},
    "evaluation": {"every": 2, "held_out": 0.3},
    "traffic.delta": "int8",
    "traffic.model": "bf16",
}
"""Each section lets nodes keep, draw or send something of its own; processes are dear, so they meet in one run."""
NODES = 40
SHAPES = {"shared/a": torch.Size([30, 50]), "shared/b": torch.Size([3])}


def start(workers: int, app: str = "pool_app:app") -> tuple[WorkerPool, InlineGrid]:
    """Start a pool, and the grid in front of it, whose workers find the tests' ClientApp."""
    here = str(Path(__file__).resolve().parents[2] / "harness")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])))
        pool = WorkerPool(workers, app, run_id=1, nodes=NODES, run_config={})
    return pool, InlineGrid(ClientApp(), NODES, 1, {}, lambda reply: None, pool)


@pytest.fixture(scope="module")
def alone():
    """One worker for several tests: to start a process costs more than all they ask of it."""
    pool, grid = start(1)
    with pool:
        yield pool, grid


@pytest.fixture(scope="module")
def three():
    pool, grid = start(3)
    with pool:
        yield pool, grid


def broadcast(value: float) -> RecordDict:
    tensors = {name: torch.full(shape, value) for name, shape in SHAPES.items()}
    return encode(make_reply(), tensors)


def check(reply: Message, first_node: int, value: float) -> None:
    number = reply.metadata.src_node_id - first_node
    assert decode(reply.content, TrainReply).charge_id == f"{number:064x}"
    for tensor in tensors_of(reply.content, SHAPES).values():
        assert bool((tensor == value + number).all())


def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path):
    """Of any part of a run: weights, what every ledger holds, what nodes chose, and all that metrics say."""
    scenario = read_scenario(find("digits"), EVERYTHING)
    runs = []
    for workers in (1, 2):
        run = RunDirectory.create(scenario, tmp_path / str(workers))
        simulate(scenario, run, workers=workers)
        runs.append(run)
    for name in ("model/model.safetensors", "choices.json"):
        assert (runs[0].path / name).read_bytes() == (runs[1].path / name).read_bytes()
    assert events(runs[0]) == events(runs[1])
    assert runs[0].held_out_ledgers
    assert [events_of(path) for path in runs[0].held_out_ledgers] == [
        events_of(path) for path in runs[1].held_out_ledgers
    ]
    for left, right in zip(runs[0].metrics(), runs[1].metrics(), strict=True):
        del left["seconds"], right["seconds"]
        assert left == right
        assert (left["accepted"], left["dropped"], left["refused"]) == (4, 0, {})
        assert left["private_load"]
    assert [line["round"] for line in runs[0].metrics() if "private_evaluation" in line] == [2, 4]
    audit = audit_run(runs[1])
    assert (audit.verdict, audit.findings) == ("NOT_REFUTED", [])
    assert audit.receipts == audit.matched == 4 * (4 + 1 + 2)  # trained, chose before the third round, evaluated


# --- messages ------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_rounds(alone):
    pool, grid = alone
    nodes = list(grid.get_node_ids())
    (worker,) = pool._workers
    files = (worker.requests._descriptor, worker.replies._descriptor)
    sizes = []
    for value in range(40):
        content = broadcast(float(value))
        for reply in grid.send_and_receive([Message(content, node, TRAIN) for node in nodes[:3]]):
            check(reply, nodes[0], float(value))
        sizes.append([os.fstat(descriptor).st_size for descriptor in files])
    slot = 8192  # what one message's tensors take
    assert sizes[-1][0] <= 8 * slot  # the broadcasts a worker keeps, and some on their way
    assert sizes[-1][1] <= 10 * slot


def test_a_worker_is_sent_what_it_has_forgotten_again(alone):
    _, grid = alone
    nodes = list(grid.get_node_ids())
    contents = [broadcast(float(value)) for value in range(6)]
    for turn in (*range(6), 5, 2, 0, 3, 3, 1, 5):
        for reply in grid.send_and_receive([Message(contents[turn], nodes[turn], TRAIN)]):
            check(reply, nodes[0], float(turn))


@pytest.mark.parametrize("workers", in_the_soak_unless(["alone"], ["alone", "three"]))
def test_every_message_is_answered_once_and_kept_replies_stay(workers, request):
    _, grid = request.getfixturevalue(workers)
    nodes = list(grid.get_node_ids())
    kept = []
    for value, count in enumerate((0, 1, 3, NODES, NODES, 2)):
        content = broadcast(float(value))
        replies = list(grid.send_and_receive(Message(content, node, TRAIN) for node in nodes[:count]))
        assert sorted(reply.metadata.src_node_id for reply in replies) == nodes[:count]
        kept += [(reply, float(value)) for reply in replies]
    for reply, value in kept:
        check(reply, nodes[0], value)


@pytest.mark.parametrize(
    ("app", "kind", "says"),
    [
        pytest.param("no_such_module:app", TRAIN, "no_such_module", marks=pytest.mark.slow),
        ("pool_app:app", "query.other", "worker processes carry one document"),
    ],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_worker_that_dies_is_an_error_not_a_hang(capfd, app, kind, says):
    pool, grid = start(1, app)
    with pool, pytest.raises((RuntimeError, OSError)):
        list(grid.send_and_receive([Message(RecordDict(), grid.get_node_ids()[0], kind)]))
    assert says in capfd.readouterr().err


def test_an_app_that_answers_with_an_error_ends_its_worker():
    """Of the same worker in this process: nothing that its end needs is another process's."""
    hello = Frame({"run_id": 1, "nodes": NODES}, "{}")
    header = {"number": 0, "sent": 1, "type": "query.error", "group": "", "created_at": 0.0, "ttl": 1.0}
    with closing(SlotReader(anonymous_file())) as requests, closing(SlotWriter(anonymous_file())) as replies:
        worker = Worker(pool_app.app, hello, requests, replies)
        with pytest.raises(ValueError, match="Message content is None"):
            worker.answer(Frame({**header, "freed": [], "broadcast": None}, None))
