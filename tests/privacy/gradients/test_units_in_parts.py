"""A unit that is larger than there is room for: in parts, and what it contributes is what it contributes as a whole."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import make_batch, make_config
from microbatches import alone
from test_clipping import FULL, MODES, SECRET, TwoTasks, clipped_sum, expected_sum
from torch import nn

from conclave.base.errors import BadInputError
from conclave.model.building import build
from conclave.privacy.bookkeeping import Units
from conclave.privacy.gradients.unit_index import UnitIndex
from conclave.privacy.releases.load_histogram import LOADS
from conclave.privacy.releases.private_metrics import MetricSums
from conclave.privacy.training.private_training import PrivateTraining

SIZES = (7, 1, 3, 1)
GROUPS = torch.repeat_interleave(torch.tensor([5, 2, 9, 4]), torch.tensor(SIZES))
NUMBERS = torch.repeat_interleave(torch.tensor([2, 0, 3, 1]), torch.tensor(SIZES))  # units are in the order of groups
IN_PARTS = {"records_per_unit": 7, "physical_batch": 2}


@pytest.fixture(scope="module")
def subject():
    return build(make_config(), seed=3), make_batch(len(GROUPS))


def joint(total):
    return torch.cat([t.flatten() for t in total.values()])


@pytest.mark.parametrize("kind", ["flat", "per-layer", "automatic", "adaptive"])
@pytest.mark.parametrize("mode", MODES)
def test_the_sum_equals_microbatches_clipped_one_by_one(subject, mode, kind):
    network, batch = subject
    expected = joint(expected_sum(network, network.loss, batch, kind, FULL.clip, NUMBERS))
    mechanism = replace(FULL, clipping=kind, **MODES[mode], **IN_PARTS)
    actual = joint(clipped_sum(network, network.loss, batch, mechanism, GROUPS))
    assert float(torch.nn.functional.cosine_similarity(actual, expected, dim=0)) > 1 - 1e-5
    assert 0.997 < float(actual.norm() / expected.norm()) <= 1.0 + 1e-6


@pytest.mark.parametrize("kind", ["flat", "per-layer", "automatic"])
@pytest.mark.parametrize("mode", MODES)
def test_a_unit_in_parts_moves_the_sum_by_at_most_the_clip_bound(subject, mode, kind):
    """Its gradient is forty times the bound, so that clipping any part by itself would show."""
    network, batch = subject
    mechanism = replace(FULL, clip=0.01, clipping=kind, **MODES[mode], **IN_PARTS)
    everyone = clipped_sum(network, network.loss, batch, mechanism, GROUPS)
    keep_B = GROUPS != 5
    fewer = {name: tensor[keep_B] for name, tensor in batch.items()}
    without = clipped_sum(network, network.loss, fewer, mechanism, GROUPS[keep_B])
    moved = float((joint(everyone) - joint(without)).norm())
    assert 0.9 * mechanism.clip < moved <= mechanism.clip


def test_at_level_strict_its_contribution_has_the_same_bits_whoever_else_is_there(subject):
    network, batch = subject
    mechanism = replace(FULL, numeric="strict", **IN_PARTS)
    index = UnitIndex(len(GROUPS), GROUPS, 7)
    with PrivateTraining(network, torch.optim.SGD(network.parameters()), network.loss, mechanism, SECRET) as training:
        sums = [
            training.sums_without_noise(batch, index, torch.tensor(chosen)) for chosen in ([0, 1, 2, 3], [0, 1, 3], [2])
        ]
    for everyone, others, mine in zip(*sums, strict=True):
        assert torch.equal(everyone, others + mine)
        assert bool((mine != 0).any()) or mine.numel() < 64


@pytest.mark.parametrize("mode", MODES)
def test_one_part_that_is_no_number_leaves_the_unit_out_as_a_whole(subject, mode):
    network, batch = subject
    poisoned = {name: tensor.clone() for name, tensor in batch.items()}
    poisoned["image"][6] = math.nan  # the last record of the group of seven
    mechanism = replace(FULL, **MODES[mode], **IN_PARTS)
    with_it = clipped_sum(network, network.loss, poisoned, mechanism, GROUPS)
    keep_B = GROUPS != 5
    fewer = {name: tensor[keep_B] for name, tensor in batch.items()}
    without = clipped_sum(network, network.loss, fewer, mechanism, GROUPS[keep_B])
    assert torch.equal(joint(with_it), joint(without))


def test_each_task_is_clipped_before_the_joint_clip():
    torch.manual_seed(1)
    module, batch = TwoTasks(), {"x": torch.randn(len(GROUPS), 6)}
    whole = replace(FULL, records_per_unit=7)
    expected = joint(clipped_sum(module, module.loss, batch, whole, GROUPS))
    actual = joint(clipped_sum(module, module.loss, batch, replace(whole, physical_batch=2), GROUPS))
    assert float((actual - expected).norm()) < 1e-4 * float(expected.norm())
    with pytest.raises(BadInputError, match="several tasks need gradients 'bookkeeping'"):
        clipped_sum(module, module.loss, batch, replace(FULL, gradients="hooks", **IN_PARTS), GROUPS)


def test_loads_and_metrics_of_a_unit_in_parts_are_those_of_the_whole_to_the_last_bit(subject):
    network, batch = subject
    index = UnitIndex(len(GROUPS), GROUPS, 7)
    counted = []
    for physical in (512, 2):
        mechanism = replace(FULL, load_share=0.2, records_per_unit=7, physical_batch=physical)
        assert LOADS in mechanism.noise_parts
        optimizer = torch.optim.SGD(network.parameters())
        with PrivateTraining(network, optimizer, network.loss, mechanism, SECRET) as training:
            counted.append(training.loads_without_noise(batch, index, torch.arange(4)))
    assert torch.equal(*counted)
    assert counted[0].any()
    value_B, whole, parts = torch.rand(7, dtype=torch.float64), MetricSums(), MetricSums()
    whole.add(value_B, Units(7, 1, torch.zeros(7, dtype=torch.int64)))
    parts.add_part(value_B[:4], None)
    parts.add_part(value_B[4:], 7)
    assert torch.equal(whole.exact(), parts.exact())


@pytest.mark.parametrize("mode", MODES)
def test_no_more_examples_are_processed_at_once_than_there_is_room_for_whatever_was_drawn(mode):
    module, seen = nn.Linear(4, 3), []

    def loss(batch):
        seen.append(len(batch["x"]))
        return module(batch["x"]).square().mean(1)

    for sizes in ([1] * 40, [40], [1] * 8 + [40], [3, 9, 1, 20, 2]):
        group_B = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        mechanism = replace(FULL, records_per_unit=1_000_000, physical_batch=8, **MODES[mode])
        clipped_sum(module, loss, {"x": torch.randn(len(group_B), 4)}, mechanism, group_B)
        assert max(seen) <= 8


def test_without_privacy_a_unit_in_parts_still_counts_with_the_mean_of_its_records(subject):
    network, batch = subject
    open_ = replace(FULL, noise_multiplier=None, **IN_PARTS)
    actual = clipped_sum(network, network.loss, batch, open_, GROUPS)
    truth = alone(network, network.loss, batch, NUMBERS)
    for name, p in network.named_parameters():
        torch.testing.assert_close(actual[name].float(), truth[p].sum(0), rtol=1e-4, atol=1e-6)


class Failing(nn.Module):
    """Cannot process a record whose first value is above 1, alone or among others."""

    def __init__(self):
        super().__init__()
        self.score = nn.Linear(4, 3)

    def loss(self, batch):
        if bool((batch["x"][:, 0] > 1.0).any()):
            raise MemoryError("no more")
        return self.score(batch["x"]).square().mean(1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("failing", [0, 11])  # a record of the group that comes in parts; one that comes with others
def test_a_unit_that_cannot_be_processed_contributes_nothing_where_that_must_not_show(mode, failing):
    torch.manual_seed(1)
    module, x_BD = Failing(), torch.rand(len(GROUPS), 4)
    x_BD[failing, 0] = 2.0
    index = UnitIndex(len(GROUPS), GROUPS, 7)
    others = [unit for unit in range(4) if unit != int(NUMBERS[failing])]
    for mechanism in (replace(FULL, **MODES[mode], **IN_PARTS), replace(FULL, **MODES[mode], records_per_unit=7)):
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        with PrivateTraining(module, optimizer, module.loss, mechanism, SECRET, contain=True) as training:
            everyone = training.sums_without_noise({"x": x_BD}, index, torch.arange(4))
            without = training.sums_without_noise({"x": x_BD}, index, torch.tensor(others))
        for total, expected in zip(everyone, without, strict=True):
            torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-9)
            assert bool((total != 0).any())
        with (
            pytest.raises(MemoryError),
            PrivateTraining(module, optimizer, module.loss, mechanism, SECRET) as training,
        ):
            training.sums_without_noise({"x": x_BD}, index, torch.arange(4))
