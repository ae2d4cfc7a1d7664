"""Checkpoints: what was written is read back, bit by bit; a failure leaves the previous one."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save

from conclave.base.errors import BadInputError
from conclave.server.aggregate.config import ServerSgd
from conclave.server.aggregate.optimizer import ServerOptimizer
from conclave.server.rounds.checkpoint import Checkpoint, read_checkpoint, write_checkpoint


def sample(round_number=3) -> Checkpoint:
    return Checkpoint(
        round=round_number,
        run_id="12345",
        plan_hash="ab" * 32,
        tensors={"shared/a:b": torch.tensor([-0.0, 1e-45, 1 / 3]), "expert/0/1/up.weight": torch.ones(2, 3)},
        optimizer={
            "shared/a:b": {"exp_avg": torch.tensor([5.0, 6.0, 7.0]), "step": torch.tensor(3.0)},
            "expert/0/1/up.weight": {"exp_avg": torch.full((2, 3), 1 / 7), "step": torch.tensor(1.0)},
        },
        history={
            "0123456789abcdef": {"shared/a:b": torch.tensor([1 / 9, -0.0])},
            "f" * 16: {"shared/c": torch.ones(1)},
        },
        average={"shared/a:b": torch.tensor([0.1, -0.0, 2.0]), "expert/0/1/up.weight": torch.full((2, 3), 1e-45)},
        averaged=2,
    )


def same(a: Checkpoint, b: Checkpoint) -> bool:
    def bits(tensors):
        return {name: (t.shape, t.dtype, t.view(torch.int32).flatten().tolist()) for name, t in tensors.items()}

    def remembered(optimizer):
        return {name: bits(kept) for name, kept in optimizer.items()}

    facts = [
        (
            c.round,
            c.run_id,
            c.plan_hash,
            bits(c.tensors),
            remembered(c.optimizer),
            remembered(c.history),
            bits(c.average),
            c.averaged,
        )
        for c in (a, b)
    ]
    return facts[0] == facts[1]


def test_round_trip(tmp_path):
    path = tmp_path / "checkpoint" / "round.safetensors"
    write_checkpoint(path, sample())
    assert same(read_checkpoint(path), sample())
    write_checkpoint(path, sample(4))
    assert same(read_checkpoint(path), sample(4))
    assert [p.name for p in path.parent.iterdir()] == ["round.safetensors"]


def test_a_checkpoint_from_when_there_was_only_momentum(tmp_path):
    path = tmp_path / "c"
    tensors = {"model:shared/a:b": torch.ones(2), "momentum:shared/a:b": torch.tensor([3.0, 4.0])}
    path.write_bytes(save(tensors, metadata={"state": '{"round": 7, "run_id": "1", "plan_hash": "p"}'}))
    back = read_checkpoint(path)
    assert (back.round, list(back.tensors)) == (7, ["shared/a:b"])
    assert back.optimizer["shared/a:b"]["momentum_buffer"].tolist() == [3.0, 4.0]
    assert (back.averaged, back.average) == (0, {})
    optimizer = ServerOptimizer(ServerSgd(momentum=0.5), {"shared/a:b": torch.zeros(2)})
    optimizer.restore(back.tensors, back.optimizer)
    optimizer.step({"shared/a:b": torch.zeros(2)}, 1.0)  # torch's buffer has the gradient's sign
    assert optimizer.snapshot()["shared/a:b"].tolist() == [1 - 1.5, 1 - 2.0]


def test_views_and_transposes_are_stored_by_value(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    tensors = {"expert/0/0/up.weight": base[1], "expert/0/1/up.weight": base[2], "shared/t": base.clone().T}
    path = tmp_path / "c"
    write_checkpoint(path, Checkpoint(1, "r", "p", tensors, {}))
    back = read_checkpoint(path)
    assert all(torch.equal(back.tensors[name], t) for name, t in tensors.items())
    assert back.optimizer == {}


def refusal(path) -> str:
    with pytest.raises(BadInputError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_missing(tmp_path):
    refusal(tmp_path / "nothing")
    refusal(tmp_path)  # a directory


@pytest.mark.parametrize("keep", [0.0, 0.02, 0.3, 0.9, 0.999])
def test_truncated(tmp_path, keep):
    path = tmp_path / "c"
    write_checkpoint(path, sample())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    refusal(path)


@pytest.mark.parametrize(
    ("metadata", "name"),
    [
        (None, "model:a"),
        ({"other": "1"}, "model:a"),
        ({"state": "{"}, "model:a"),
        ({"state": "[]"}, "model:a"),
        ({"state": '{"round": 1}'}, "model:a"),
        ({"state": '{"round": "x", "run_id": "1", "plan_hash": "p"}'}, "model:a"),
        ({"state": '{"round": null, "run_id": "1", "plan_hash": "p"}'}, "model:a"),
        ({"state": '{"round": 1, "run_id": "1", "plan_hash": "p"}'}, "optimizers:a"),
    ],
)
def test_a_file_that_is_no_checkpoint(tmp_path, metadata, name):
    path = tmp_path / "c"
    path.write_bytes(save({name: torch.ones(1)}, metadata=metadata))
    refusal(path)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch, call):
    path = tmp_path / "c"
    write_checkpoint(path, sample(3))

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(path, sample(4))
    monkeypatch.undo()
    assert same(read_checkpoint(path), sample(3))


@pytest.mark.parametrize("state", ["[" * 100_000, "[]", "{}", '{"round": ' + "9" * 5000 + "}", '{"run_id": "\\ud800"}'])
def test_a_state_that_is_none_is_named(tmp_path, state):
    path = tmp_path / "c"
    path.write_bytes(save({"model:shared/a": torch.ones(2)}, metadata={"state": state}))
    with pytest.raises(BadInputError, match="missing or damaged, must be a checkpoint"):
        read_checkpoint(path)
