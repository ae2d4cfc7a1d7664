"""What a batch takes, told beforehand from public shapes, is not less than what it takes in fact."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import make_batch, make_config, make_text_config
from test_clipping import FULL, SECRET
from torch import nn

from conclave.model.building import build
from conclave.privacy.gradients.memory_meter import MemoryMeter
from conclave.privacy.gradients.physical_batch import MOST, TRIED, Footprint, Room
from conclave.privacy.gradients.unit_index import UnitIndex
from conclave.privacy.training.private_training import PrivateTraining

MODES = {"bookkeeping": {}, "hooks": {"gradients": "hooks"}, "ghost": {"gradients": "ghost"}}


def test_the_meter_counts_what_lives_at_once():
    with MemoryMeter(lambda _: True) as meter:
        kept = torch.zeros(1000)
        view = kept[1:].view(-1)
        del view
        for _ in range(3):
            torch.ones(500)
        kept = kept + 1
    assert meter.peak == 8000 == 4 * 2000


def training_of(network, mechanism):
    return PrivateTraining(network, torch.optim.SGD(network.parameters()), network.loss, mechanism, SECRET)


def taken(training, network, batch, index, chosen):
    """The most bytes at once, without what has as many values as a parameter."""
    sizes = {p.numel() for p in network.parameters()}
    with MemoryMeter(lambda values: values not in sizes) as meter:
        training.accumulate(batch, index, chosen)
    return meter.peak


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("config", [make_config(), make_text_config()])
def test_records_take_no_more_than_what_was_told(config, mode):
    network = build(config, seed=3)
    mechanism = replace(FULL, physical_batch=64, **MODES[mode])
    with training_of(network, mechanism) as training:
        told = training.footprint(network.synthetic_batch(TRIED))
        took = taken(training, network, network.synthetic_batch(60, seed=1), UnitIndex(60), torch.arange(60))
    assert 0.3 * told.of(60, 1) < took <= told.of(60, 1)


@pytest.mark.parametrize("sizes", [[6] * 10, [60], [20, 1, 1, 1, 1, 1], [1] * 60])
def test_groups_take_no_more_than_what_was_told_even_where_all_tokens_choose_the_same_experts(sizes):
    network = build(make_text_config(), seed=3)
    examples = sum(sizes)
    batch = {"text": torch.full((examples, 12), 65, dtype=torch.uint8)}
    group_B = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    with training_of(network, replace(FULL, records_per_unit=60, physical_batch=64)) as training:
        told = training.footprint(network.synthetic_batch(TRIED))
        index = UnitIndex(examples, group_B, 60)
        took = taken(training, network, batch, index, torch.arange(len(sizes)))
    assert told.pair > 0
    assert told.unit > 0
    assert took <= told.of(len(sizes), max(sizes))


def test_a_batch_is_as_large_as_its_memory_and_no_larger():
    room = Footprint(example=10, pair=1, unit=100).room(1000)
    assert room.examples == 1000 // 11
    assert room.holds(1, 25)  # 250 + 625 + 100
    assert not room.holds(1, 26)  # 260 + 676 + 100
    assert room.largest_unit == 25
    assert Footprint(example=10).room(1) == Room(1, Footprint(example=10), 1)  # one example has to be tried
    assert Footprint(example=10).room(1 << 40).examples == MOST


def test_groups_are_packed_by_the_size_that_they_are_padded_to():
    sizes = [8, 1, 1, 1, 1, 1, 1, 1, 1, 8]
    group_B = torch.repeat_interleave(torch.arange(10), torch.tensor(sizes))
    index, room = UnitIndex(len(group_B), group_B, 8), Room(16)
    batches = list(index.batches(torch.arange(10), room))
    assert sorted(torch.cat([b.example_B for b in batches]).tolist()) == list(range(len(group_B)))
    for batch in batches:
        largest = int(torch.bincount(batch.units.unit_B).max())
        assert batch.units.count * largest <= 1.5 * room.examples


def test_values_do_not_decide_how_much_is_processed_at_once():
    """Only shapes do: made-up records stand for those that are there."""
    rooms, module = [], nn.Linear(6, 3)
    for value in (0.0, 1e30):
        batch = {"x": torch.full((200, 6), value)}
        with PrivateTraining(
            module,
            torch.optim.SGD(module.parameters()),
            lambda b: module(b["x"]).square().mean(1),
            replace(FULL, memory_bytes=1 << 14),
            SECRET,
        ) as training:
            training.accumulate(batch, UnitIndex(200), torch.arange(200))
            rooms.append(training._room)
    assert rooms[0] == rooms[1]
    assert 1 <= rooms[0].examples < 200


def test_a_small_batch_of_records_needs_no_look():
    network, batch = build(make_config(), seed=3), make_batch(20)
    with training_of(network, FULL) as training:
        training.accumulate(batch, UnitIndex(20), torch.arange(20))
        assert training._room is None
