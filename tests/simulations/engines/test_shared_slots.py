"""Tensors in shared memory: what is written is what is read, in place, and stays while anyone holds it."""

from __future__ import annotations

import itertools
import json
import mmap
import os

import pytest
import torch
from flwr.app import Array

from conclave.protocol.tensor_array import STYPE, TensorArray, pack
from conclave.simulations.engines import shared_slots
from conclave.simulations.engines.shared_slots import SlotReader, SlotWriter, anonymous_file


class Pair:
    """Both sides of one file; a place goes from one to the other as JSON, as it does in a frame."""

    def __init__(self):
        self.descriptor = anonymous_file()
        self.writer, self.reader = SlotWriter(os.dup(self.descriptor)), SlotReader(self.descriptor)

    def hand_over(self, tensors):
        """Tell the writer what is free, write, and read."""
        self.writer.free(self.reader.freed())
        return self.reader.read(json.loads(json.dumps(self.writer.write(TensorArray(tensors)))))

    @property
    def size(self) -> int:
        return os.fstat(self.descriptor).st_size


@pytest.fixture
def pair():
    both = Pair()
    yield both
    both.writer.close()
    both.reader.close()


def test_tensors_of_any_shape_arrive_as_they_were(pair):
    generator = torch.Generator().manual_seed(0)
    for size in (1, 5, 3000, 7, 0, 100_000):
        tensors = {
            "b": torch.randn(3, 5 + size, generator=generator),
            "a": torch.randn(1, generator=generator),
            "c": torch.randn(4, 6, generator=generator).T,  # not contiguous
            "d": torch.zeros(0, 2),
            "e": torch.tensor(2.5),
            "f": torch.nn.Parameter(torch.randn(2, 3, generator=generator)),
        }
        got = pair.hand_over(tensors)
        assert list(got) == list(tensors)
        assert all(torch.equal(got[name], tensors[name]) for name in tensors)
        assert all(tensor.data_ptr() % 64 == 0 and tensor.is_contiguous() for tensor in got.values())
        assert pack(got) == pack(tensors)
    empty = pair.hand_over({"empty": torch.zeros(0, 3)})["empty"]
    assert empty.shape == (0, 3)
    assert pair.hand_over({}) == {}


def test_kept_tensors_are_not_overwritten_while_the_file_grows(pair):
    kept = [pair.hand_over({"a": torch.full((1000 * number,), float(number))}) for number in range(1, 30)]
    for number, tensors in enumerate(kept, 1):
        assert torch.equal(tensors["a"], torch.full((1000 * number,), float(number)))


def test_dropped_slots_are_used_again(pair):
    for number in range(50):
        tensors = pair.hand_over({"a": torch.full((1000,), float(number))})
        assert torch.equal(tensors["a"], torch.full((1000,), float(number)))
    del tensors
    assert pair.size == 2 * mmap.ALLOCATIONGRANULARITY  # one is still held when the next is written
    for size in (2000, 1100, 1900, 2048) * 5:  # other sizes find room in each other's slots
        pair.hand_over({"a": torch.zeros(size)})
    assert pair.size == 4 * mmap.ALLOCATIONGRANULARITY


@pytest.mark.parametrize(
    "derive",
    [
        lambda tensors: tensors["b"],
        lambda tensors: tensors["b"].view(-1)[3:5],
        lambda tensors: tensors["b"].detach().T,
        lambda tensors: tensors["b"].numpy()[1:],
        lambda tensors: tensors["b"].unbind()[0],
        lambda tensors: torch.nn.Parameter(tensors["b"]),
        lambda tensors: TensorArray(tensors),
    ],
)
def test_whatever_shares_its_memory_keeps_a_slot(pair, derive):
    held = derive(pair.hand_over({"a": torch.zeros(4), "b": torch.ones(3, 4)}))
    assert pair.reader.freed() == []
    del held
    assert pair.reader.freed() == [0]
    assert pair.reader.freed() == []


def test_tensors_outlive_the_file(pair):
    other = Pair()
    held = other.hand_over({"a": torch.ones(5)})["a"]
    other.writer.close()
    other.reader.close()
    del other
    assert torch.equal(held, torch.ones(5))


def test_a_layout_is_told_once(pair, monkeypatch):
    monkeypatch.setattr(shared_slots, "_KEPT_LAYOUTS", 2)
    first, second, third = ({"a": torch.zeros(size)} for size in (2, 3, 4))
    places = [pair.writer.write(TensorArray(tensors)) for tensors in (first, second, first, second)]
    assert ["shapes" in place for place in places] == [True, True, False, False]
    assert [len(pair.reader.read(place)["a"]) for place in places] == [2, 3, 2, 3]
    for tensors in itertools.islice(itertools.cycle((first, second, third)), 10):  # more than are kept
        assert pair.hand_over(tensors)["a"].shape == tensors["a"].shape


def test_packed_bytes_stay_bytes_and_their_slot_is_free_at_once(pair):
    body = pack({"a": torch.randn(7)})
    for content in (body, b""):
        place = pair.writer.write(Array(dtype="uint8", shape=(len(content),), stype=STYPE, data=content))
        assert pair.reader.read(place) == content
    assert pair.reader.freed() == [0]


def test_tensors_of_other_types_travel_packed(pair):
    tensors = {"a": torch.arange(3)}
    assert pair.hand_over(tensors) == pack(tensors)
