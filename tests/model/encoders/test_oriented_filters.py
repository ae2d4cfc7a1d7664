"""The bank of filters: what a first and a second derivative along a direction must do."""

from __future__ import annotations

import pytest
import torch

from conclave.model.encoders.oriented_filters import oriented_filters


@pytest.mark.parametrize(("count", "side"), [(1, 3), (5, 3), (8, 5), (16, 7)])
def test_every_filter_has_mean_zero_and_norm_one_and_is_another(count, side):
    bank = oriented_filters(count, side)
    assert bank.shape == (count, side, side)
    torch.testing.assert_close(bank.mean(dim=(1, 2)), torch.zeros(count, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(bank.flatten(1).norm(dim=1), torch.ones(count, dtype=torch.float64))
    likeness = (bank.flatten(1) @ bank.flatten(1).T).fill_diagonal_(0.0)
    assert float(likeness.max()) < 0.999


def test_the_first_finds_edges_and_the_second_lines():
    edge, line = oriented_filters(2, 7)
    step, bar = torch.zeros(7, 7, dtype=torch.float64), torch.zeros(7, 7, dtype=torch.float64)
    step[:, 4:], bar[:, 3] = 1.0, 1.0
    assert abs(float((edge * step).sum())) > 1.0
    assert abs(float((edge * bar).sum())) < 1e-12
    assert abs(float((line * bar).sum())) > 1.0
    assert abs(float((edge * step.T).sum())) < 1e-12  # along the other direction nothing changes


def test_a_quarter_turn_on_is_the_filter_of_columns_for_rows():
    bank = oriented_filters(4, 5)
    torch.testing.assert_close(bank[2], bank[0].T)
    torch.testing.assert_close(bank[3], bank[1].T)
