"""Releases minus what is known must be the stated noise: of its size and law, and never repeated."""

from __future__ import annotations

import math

import torch
from scipy import stats
from torch import Tensor

FALSE_ALARM = 1e-6
"""Per test. All randomness follows from a fixed secret, so an outcome repeats."""


def noise_flaws(residual_RN: Tensor, entry: str) -> list[str]:
    """Say what is wrong with residuals of releases (rows) by entry, in units of the stated standard deviation.

    Args:
        entry: what a column is, for messages.
    """
    silent = (residual_RN.abs() < 1e-6).any(0).nonzero().flatten().tolist()
    wrong = [f"{entry} {number} has no noise" for number in silent[:1]]
    if not bool(residual_RN.isfinite().all()):
        return [*wrong, "a release is not finite"]
    wrong += size_and_law(residual_RN.flatten())
    return [
        *wrong,
        *correlated("charges", residual_RN[:-1].flatten(), residual_RN[1:].flatten()),
        *correlated(f"{entry}s", residual_RN[:, :-1].flatten(), residual_RN[:, 1:].flatten()),
    ]


def size_and_law(residual_N: Tensor) -> list[str]:
    """Test finite residuals against the standard normal distribution: χ² of their squares, Kolmogorov and Smirnov."""
    wrong, count = [], len(residual_N)
    law, square = stats.chi2(count), float(residual_N.square().sum())
    if not law.ppf(FALSE_ALARM / 2) <= square <= law.ppf(1 - FALSE_ALARM / 2):
        wrong.append(f"its standard deviation is {math.sqrt(square / count):.4f} of what is stated")
    if stats.kstest(residual_N.numpy(), "norm").pvalue < FALSE_ALARM:
        wrong.append("it is not Gaussian")
    return wrong


def correlated(what: str, a_N: Tensor, b_N: Tensor) -> list[str]:
    """Compare two rows of residuals; from too few, nothing follows."""
    if len(a_N) <= 100:
        return []
    correlation = float(torch.corrcoef(torch.stack([a_N, b_N]))[0, 1])
    if abs(correlation) <= -float(stats.norm.ppf(FALSE_ALARM / 2)) / math.sqrt(len(a_N)):
        return []
    return [f"noise of different {what} is correlated ({correlation:.2f})"]
