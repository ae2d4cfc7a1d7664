"""A metric with noise: sensitivity by brute force, sums against plain arithmetic, the mean against its own error."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from conclave.privacy.bookkeeping import Units
from conclave.privacy.randomness import derive
from conclave.privacy.releases.private_metrics import GRID_BITS, MetricSums, private_mean

STEP = 2.0**-GRID_BITS


def sums_of(values, group=None):
    """The exact sums of some units, float64."""
    sums = MetricSums()
    value_B = torch.tensor(values, dtype=torch.float64)
    units = Units.one_each(len(values))
    if group is not None:
        numbers = torch.tensor(group).unique_consecutive(return_inverse=True)[1]
        units = Units(len(values), int(numbers[-1]) + 1 if len(values) else 0, numbers)
    sums.add(value_B, units)
    return sums.exact()


@pytest.mark.parametrize(
    "values",
    [
        (0.0, 1.0, 0.5, 1 / 3, math.nan),
        (math.inf, -math.inf, -7.0, 9.0, 1e300),
        (1e-300, 1.0 - 1e-16, 0.7071067811865476, 0.2, 0.0),
    ],
)
def test_adding_or_removing_any_unit_moves_the_sums_by_at_most_one(values):
    largest = 0.0
    for subset in itertools.product([False, True], repeat=len(values)):
        kept = [value for value, keep in zip(values, subset, strict=True) if keep]
        for place, keep in enumerate(subset):
            if keep:
                other = [v for i, (v, k) in enumerate(zip(values, subset, strict=True)) if k and i != place]
                largest = max(largest, float((sums_of(kept) - sums_of(other)).norm()))
    assert largest == 1.0


def test_a_group_counts_as_one_unit_whatever_its_size():
    values, group = [1.0, 1.0, 0.0, 0.5, 1.0], [0, 0, 0, 1, 2]
    assert sums_of(values, group).tolist() == pytest.approx([2 / 3 + 0.5 + 1.0, 1 / 3 + 0.5], abs=4 * STEP)
    assert float(sums_of(values, group).sum()) == 3.0
    for gone in range(3):
        kept = [(v, g) for v, g in zip(values, group, strict=True) if g != gone]
        other = sums_of(*map(list, zip(*kept, strict=True)))
        assert float((sums_of(values, group) - other).norm()) <= 1.0


def test_batches_add_up_and_no_noise_means_none():
    sums = MetricSums()
    for part in ([0.25, 0.5], [1.0]):
        sums.add(torch.tensor(part), Units.one_each(len(part)))
    assert sums.noised(None, bytes(32)).tolist() == [1.75, 1.25]
    assert MetricSums().noised(None, bytes(32)).tolist() == [0.0, 0.0]


def test_noise_has_the_stated_size_and_depends_on_the_secret():
    """χ² of 4000 values against σ²: five deviations of the ratio are 0.112; a false alarm has probability 1e-6."""
    sums = MetricSums()
    drawn = torch.stack([sums.noised(3.0, derive(bytes(32), number)) for number in range(2000)]).double()
    assert abs(float(drawn.square().mean()) / 9.0 - 1.0) < 0.112
    assert abs(float(drawn[:, 0] @ drawn[:, 1]) / 2000 / 9.0) < 5 / 2000**0.5
    assert torch.equal(sums.noised(3.0, bytes(32)), sums.noised(3.0, bytes(32)))
    assert len(drawn.unique(dim=0)) == 2000


def test_the_mean_and_its_error_are_what_many_draws_show():
    """The spread of 4000 means against the stated error: a false alarm has probability about 1e-6."""
    sums = MetricSums()
    sums.add(torch.tensor([1.0] * 90 + [0.0] * 10), Units.one_each(100))
    means = [private_mean(tuple(sums.noised(2.0, derive(bytes(32), number)).tolist()), 2.0) for number in range(4000)]
    values = torch.tensor([mean.value for mean in means], dtype=torch.float64)
    stated = private_mean((90.0, 10.0), 2.0)
    assert stated.noise == pytest.approx(2.0 * math.hypot(0.9, 0.1) / 100)
    assert abs(float(values.mean()) - 0.9) < 5 * stated.noise / 4000**0.5 + 2e-3  # a ratio's own bias is of order 1/n²
    assert abs(float(values.std()) / stated.noise - 1.0) < 0.06


@pytest.mark.parametrize("sums", [(3.0, 1.0), (-5.0, 2.0), (0.0, 0.0)])
def test_what_noise_drowns_is_no_mean(sums):
    assert private_mean(sums, 2.0) is None
    assert private_mean((0.0, 0.0), 0.0) is None


def test_a_mean_stays_within_its_bounds():
    assert private_mean((52.0, -2.0), 1.0).value == 1.0
    assert private_mean((-2.0, 52.0), 1.0).value == 0.0
