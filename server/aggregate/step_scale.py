"""How far an expert moves if fewer nodes returned it than could be expected."""

from __future__ import annotations

from collections.abc import Mapping

from conclave.model.parameters import owner


def step_scales(expected: float, holders: Mapping[str, int]) -> dict[str, float]:
    """Return tensor name → ``min(1, n / expected)`` for the experts and router rows that n nodes returned.

    ``expected`` is how many nodes return an expert on average when all that are asked answer. The scaled mean is the
    sum divided by ``max(n, expected)``: the clipped denominator of McMahan et al. 2018 (arXiv:1710.06963), as if the
    missing contributions were zeros. The mean of n deltas with noise σ² has a variance of σ²/n, so a step carries
    n·σ²/expected² ≤ σ²/expected: no expert takes in more noise in a round than one with all its holders. One with more
    than expected steps no further than its mean. Shared weights, which every reply holds, are not scaled.

    Args:
        expected: see :func:`conclave.server.rounds.coverage.expected_holders`.
        holders: tensor name → n.
    """
    return {name: min(1.0, n / expected) for name, n in holders.items() if owner(name).layer is not None}
