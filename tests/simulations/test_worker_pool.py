"""Worker processes: the same results as in process, whatever their number."""

from __future__ import annotations

import socket

import pytest
import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from test_simulate import events

from clients.protocol import TrainReply, encode, tensors_of
from clients.tensor_array import pack
from data.shipped_scenarios import find
from server.run_directory import RunDirectory
from server.scenario import read_scenario
from simulations.frames import Frame, receive_frame, send_frame, without_tensors
from simulations.simulate import simulate
from simulations.worker_pool import WorkerPool

CHANGES = {"federation.rounds": 2, "partition.nodes": 5}


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


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_worker_that_dies_is_an_error_not_a_hang(capfd):
    scenario = read_scenario(find("digits"), CHANGES)
    with WorkerPool(1, "no_such_module:app", run_id=1, nodes=1, run_config={"scenario": scenario.to_toml()}) as pool:
        from flwr.app import Message
        from flwr.supercore.task_identity import TaskIdentity

        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 0
        message = Message(RecordDict(), 2, "query.describe")
        message.metadata.__dict__["_message_id"] = "inline-1"
        with pytest.raises((RuntimeError, OSError)):
            list(pool.run([(0, message)]))
    assert "no_such_module" in capfd.readouterr().err


def test_frames_carry_records_and_tensors():
    tensors = {"shared/a": torch.randn(3, 5)}
    content = encode(TrainReply(charge_id="abc"), tensors)
    content["more"] = MetricRecord({"x": 1.5})
    ours, theirs = socket.socketpair()
    with ours, theirs:
        frame = Frame({"number": 3, "type": "train"}, without_tensors(content), pack(tensors), 7)
        send_frame(ours, frame)
        send_frame(ours, Frame({}, RecordDict({"c": ConfigRecord({"k": "v"})}), None, 7))
        first, second = receive_frame(theirs), receive_frame(theirs)
        assert (first.header, first.blob, first.blob_id) == ({"number": 3, "type": "train"}, pack(tensors), 7)
        assert set(first.record) == {"document", "more"}
        assert (second.blob, second.blob_id) == (None, 7)
        assert second.record["c"]["k"] == "v"
        ours.close()
        assert receive_frame(theirs) is None
    assert torch.equal(tensors_of(content, {"shared/a": torch.Size([3, 5])})["shared/a"], tensors["shared/a"])


def test_a_message_cut_short_is_an_error():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b"\x00\x00\x00\x09{")
        ours.close()
        with pytest.raises(ConnectionError):
            receive_frame(theirs)
