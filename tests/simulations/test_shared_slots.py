"""Shared memory between a worker and the pool: what is written is what is read, while slots are reused and grow."""

from __future__ import annotations

import os

import torch

from simulations.shared_slots import SlotReader, SlotWriter, anonymous_file


def test_two_unread_replies_of_any_size_keep_apart():
    descriptor = anonymous_file()
    writer, reader = SlotWriter(os.dup(descriptor), 2), SlotReader(descriptor)
    sizes = [10, 3, 200_000, 0, 7, 300_000, 300_001, 1, 500_000, 64, 65]
    contents = [os.urandom(size) for size in sizes]
    waiting = []
    for content in contents:
        waiting.append((writer.write(content), content))
        if len(waiting) == 2:  # the older of two is read before a third is written
            at, expected = waiting.pop(0)
            assert reader.read(at, len(expected)) == expected
    at, expected = waiting.pop()
    assert reader.read(at, len(expected)) == expected
    reader.close()


def test_tensors_arrive_as_they_were_and_are_copies():
    descriptor = anonymous_file()
    writer, reader = SlotWriter(os.dup(descriptor), 2), SlotReader(descriptor)
    generator = torch.Generator().manual_seed(0)
    for round_number in range(5):
        tensors = {
            "a": torch.randn(3, 5 + round_number, generator=generator),
            "b": torch.randn(1, generator=generator),
            "c": torch.randn(4, 6, generator=generator).T,  # not contiguous
            "d": torch.zeros(0, 2),
        }
        at, size = writer.write_tensors(tensors)
        assert size == 4 * sum(tensor.numel() for tensor in tensors.values())
        got = reader.read_tensors(at, {name: list(tensor.shape) for name, tensor in tensors.items()})
        assert got.keys() == tensors.keys()
        assert all(torch.equal(got[name], tensors[name]) for name in tensors)
        kept = got["a"].clone()
        for _ in range(2):  # both slots are overwritten
            writer.write_tensors({"a": torch.full((200,), 9.0)})
        assert torch.equal(got["a"], kept)
    assert reader.read_tensors(0, {"empty": [0, 3]})["empty"].shape == (0, 3)
    reader.close()
