"""Per-unit draws: a function of (secret, step, unit), never of the company a unit keeps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from scipy import stats

from conclave.privacy.randomness import derive, per_unit_uniform

SECRET = derive(bytes(32), "per unit")
UNITS_B = torch.tensor([3, 0, 17, 2**40, -1, 2**63 - 1, -(2**63), 4])


def test_adding_removing_or_reordering_units_changes_no_bit_of_a_unit():
    full = dict(zip(UNITS_B.tolist(), per_unit_uniform(SECRET, 5, UNITS_B, 33), strict=True))
    order = torch.randperm(len(UNITS_B), generator=torch.Generator().manual_seed(0))
    companies = [UNITS_B[order], UNITS_B[1:], UNITS_B[:1], torch.cat([torch.tensor([99]), UNITS_B])]
    for unit_B in companies:
        for unit, row in zip(unit_B.tolist(), per_unit_uniform(SECRET, 5, unit_B, 33), strict=True):
            assert unit not in full or torch.equal(row, full[unit])


def test_a_draw_does_not_depend_on_how_many_are_taken():
    many = per_unit_uniform(SECRET, 5, UNITS_B, 100)
    for count in (0, 1, 7, 8, 9, 64):
        assert torch.equal(per_unit_uniform(SECRET, 5, UNITS_B, count), many[:, :count])


def test_a_row_is_the_keystream_with_the_unit_as_nonce():
    unit, step, count = 123456789, 7, 20
    nonce = bytes(8) + unit.to_bytes(8, "little")
    cipher = Cipher(ChaCha20(derive(SECRET, "unit", step), nonce), mode=None).encryptor()
    words = np.frombuffer(cipher.update(bytes(8 * count)), dtype="<u8")
    expected = [(int(word) // 2**12 + 0.5) / 2**52 for word in words]
    assert per_unit_uniform(SECRET, step, torch.tensor([unit]), count)[0].tolist() == expected


def test_every_secret_step_and_unit_has_values_of_its_own():
    draws = [per_unit_uniform(secret, step, UNITS_B, 50) for secret in (SECRET, bytes(32)) for step in range(20)]
    everything = torch.stack(draws).flatten()
    assert len(torch.unique(everything)) == len(everything)  # 52 bits: 16,000 values collide by chance with 3e-8


def test_values_are_uniform_and_strictly_inside():
    # χ² on 1,000 bins and Kolmogorov–Smirnov, 1e-6 each for a fresh secret; this one is fixed.
    draws = per_unit_uniform(SECRET, 0, torch.arange(10_000), 64)
    assert draws.shape == (10_000, 64)
    assert draws.dtype == torch.float64
    assert float(draws.min()) > 0.0
    assert float(draws.max()) < 1.0
    flat = draws.flatten().numpy()
    assert stats.chisquare(np.bincount((flat * 1000).astype(int), minlength=1000)).pvalue > 1e-6
    assert stats.kstest(flat, "uniform").pvalue > 1e-6


@pytest.mark.parametrize("shift", [(1, 0), (0, 1), (1, 1)])
def test_steps_and_units_are_independent(shift):
    # χ² on 20 × 20 cells of (draw, draw of the next step, of the next unit, of both): 1e-6 for each of three.
    step, unit = shift
    first = per_unit_uniform(SECRET, 0, torch.arange(4000), 50).flatten().numpy()
    second = per_unit_uniform(SECRET, step, torch.arange(4000) + unit * 4000, 50).flatten().numpy()
    neighbour = per_unit_uniform(SECRET, step, torch.arange(4000) + unit, 50).flatten().numpy()
    for other in (second, neighbour):
        cells = (first * 20).astype(int) * 20 + (other * 20).astype(int)
        assert stats.chisquare(np.bincount(cells, minlength=400)).pvalue > 1e-6


def test_no_unit_is_an_empty_batch():
    assert per_unit_uniform(SECRET, 0, torch.empty(0, dtype=torch.int64), 5).shape == (0, 5)
