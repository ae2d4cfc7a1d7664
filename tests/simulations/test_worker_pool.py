"""Worker processes: the same results as in process, whatever their number."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from conftest import make_reply
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from test_simulate import events

from clients.protocol import TRAIN, TrainReply, decode, encode, tensors_of
from data.shipped_scenarios import find
from server.run_directory import RunDirectory
from server.scenario import read_scenario
from simulations.inline_engine import InlineGrid
from simulations.simulate import simulate
from simulations.worker_pool import WorkerPool

CHANGES = {"federation.rounds": 2, "partition.nodes": 5}
NODES = 40
SHAPES = {"shared/a": torch.Size([30, 50]), "shared/b": torch.Size([3])}


@pytest.fixture
def start(monkeypatch):
    """Start a pool, and the grid in front of it, whose workers find the tests' ClientApp."""
    here = str(Path(__file__).resolve().parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])))

    def make(workers: int, app: str = "pool_app:app") -> tuple[WorkerPool, InlineGrid]:
        pool = WorkerPool(workers, app, run_id=1, nodes=NODES, run_config={})
        return pool, InlineGrid(ClientApp(), NODES, 1, {}, lambda reply: None, pool)

    return make


def broadcast(value: float) -> RecordDict:
    tensors = {name: torch.full(shape, value) for name, shape in SHAPES.items()}
    return encode(make_reply(), tensors)


def check(reply: Message, first_node: int, value: float) -> None:
    number = reply.metadata.src_node_id - first_node
    assert decode(reply.content, TrainReply).charge_id == f"{number:064x}"
    for tensor in tensors_of(reply.content, SHAPES).values():
        assert bool((tensor == value + number).all())


def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path):
    scenario = read_scenario(find("digits"), CHANGES)
    runs = []
    for workers in (1, 2):
        run = RunDirectory.create(scenario, tmp_path / str(workers))
        simulate(scenario, run, workers=workers)
        runs.append(run)
    name = "model/model.safetensors"
    assert (runs[0].path / name).read_bytes() == (runs[1].path / name).read_bytes()
    assert events(runs[0]) == events(runs[1])
    for left, right in zip(runs[0].metrics(), runs[1].metrics(), strict=True):
        del left["seconds"], right["seconds"]
        assert left == right


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_message_is_answered_once_and_kept_replies_stay(start, workers):
    pool, grid = start(workers)
    nodes = list(grid.get_node_ids())
    with pool:
        kept = []
        for value, count in enumerate((0, 1, 3, NODES, NODES, 2)):
            content = broadcast(float(value))
            replies = list(grid.send_and_receive(Message(content, node, TRAIN) for node in nodes[:count]))
            assert sorted(reply.metadata.src_node_id for reply in replies) == nodes[:count]
            kept += [(reply, float(value)) for reply in replies]
        for reply, value in kept:
            check(reply, nodes[0], value)


def test_a_worker_is_sent_what_it_has_forgotten_again(start):
    pool, grid = start(1)
    nodes = list(grid.get_node_ids())
    with pool:
        contents = [broadcast(float(value)) for value in range(6)]
        for turn in (*range(6), 5, 2, 0, 3, 3, 1, 5):
            for reply in grid.send_and_receive([Message(contents[turn], nodes[turn], TRAIN)]):
                check(reply, nodes[0], float(turn))


def test_memory_does_not_grow_with_the_rounds(start):
    pool, grid = start(1)
    nodes = list(grid.get_node_ids())
    (worker,) = pool._workers
    files = (worker.requests._descriptor, worker.replies._descriptor)
    with pool:
        sizes = []
        for value in range(40):
            content = broadcast(float(value))
            for reply in grid.send_and_receive([Message(content, node, TRAIN) for node in nodes[:3]]):
                check(reply, nodes[0], float(value))
            sizes.append([os.fstat(descriptor).st_size for descriptor in files])
    slot = 8192  # what one message's tensors take
    assert sizes[-1][0] <= 8 * slot  # the broadcasts a worker keeps, and some on their way
    assert sizes[-1][1] <= 10 * slot


@pytest.mark.parametrize(
    ("app", "kind", "says"),
    [
        ("no_such_module:app", TRAIN, "no_such_module"),
        ("pool_app:app", "query.other", "worker processes carry one document"),
        ("pool_app:app", "query.error", "Message content is None"),
    ],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_worker_that_dies_is_an_error_not_a_hang(start, capfd, app, kind, says):
    pool, grid = start(1, app)
    with pool, pytest.raises((RuntimeError, OSError)):
        list(grid.send_and_receive([Message(RecordDict(), grid.get_node_ids()[0], kind)]))
    assert says in capfd.readouterr().err
