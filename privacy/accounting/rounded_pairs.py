"""Fewer distinct (q, σ), each at least as costly as those it stands for.

Raising q or lowering σ can only raise ε: the smaller q is the larger with its sample replaced by public noise some of
the time, the larger σ is the smaller with more noise added, and both are post-processing.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from conclave.privacy.accounting.rdp_curves import Pair

Array = NDArray[np.float64]

_LARGEST_EXPONENT = 700.0


@dataclass(frozen=True)
class Rounding:
    """The largest relative steps that were taken: σ down by ``noise``, q up by ``rate``, onto ``cells`` pairs."""

    pairs: int
    cells: int
    noise: float
    rate: float

    def __str__(self) -> str:
        return (
            f"{self.pairs} distinct (q, σ) rounded to {self.cells}: "
            f"σ down by at most {100 * self.noise:.2g} %, q up by at most {100 * self.rate:.2g} %"
        )


def round_pairs(steps: Mapping[Pair, int], cells: int) -> tuple[dict[Pair, int], Rounding | None]:
    """Merge pairs into at most ``cells``: the largest q and the smallest σ of each group stand for all of it.

    Groups are split where that saves most, measured by the RDP at order 2, which is ``log(1 + q²(e^(1/σ²) − 1))`` a
    step. The measure decides how tight the result is, never whether it is an upper bound.

    Args:
        steps: (q, σ) → number of steps.

    Returns:
        The merged steps, and what was rounded: None where nothing was.
    """
    if len(steps) <= cells:
        return dict(steps), None
    pairs_P2 = np.array(list(steps), dtype=np.float64)
    counts_P = np.array(list(steps.values()), dtype=np.float64)
    whole = np.arange(len(steps))
    groups: dict[int, NDArray[np.intp]] = {0: whole}
    queue = [_split(pairs_P2, counts_P, whole, 0)]
    while queue and len(groups) < cells:
        _, number, left, right = heapq.heappop(queue)
        for key, group in ((number, left), (len(groups), right)):
            groups[key] = group
            if len(group) > 1:
                heapq.heappush(queue, _split(pairs_P2, counts_P, group, key))
    merged: dict[Pair, int] = {}
    noise = rate = 0.0
    all_pairs = list(steps)
    for group in groups.values():
        q, sigma = float(pairs_P2[group, 0].max()), float(pairs_P2[group, 1].min())
        merged[q, sigma] = merged.get((q, sigma), 0) + sum(steps[all_pairs[index]] for index in group)
        noise = max(noise, 1.0 - sigma / float(pairs_P2[group, 1].max()))
        rate = max(rate, q / float(pairs_P2[group, 0].min()) - 1.0)
    return merged, Rounding(len(steps), len(merged), noise, rate)


def _split(
    pairs_P2: Array, counts_P: Array, group: NDArray[np.intp], number: int
) -> tuple[float, int, NDArray[np.intp], NDArray[np.intp]]:
    """Return minus the saving of the best cut in two across q or σ, the group's number, and the two halves."""
    best: tuple[float, NDArray[np.intp], NDArray[np.intp]] | None = None
    before = _cost(pairs_P2[group, 0].max(), pairs_P2[group, 1].min()) * counts_P[group].sum()
    for axis in (0, 1):
        ordered = group[np.argsort(pairs_P2[group, axis], kind="stable")]
        q, sigma, count = pairs_P2[ordered, 0], pairs_P2[ordered, 1], counts_P[ordered]
        low = _cost(np.maximum.accumulate(q), np.minimum.accumulate(sigma)) * np.cumsum(count)
        high = _cost(np.maximum.accumulate(q[::-1]), np.minimum.accumulate(sigma[::-1])) * np.cumsum(count[::-1])
        saved = before - (low[:-1] + high[::-1][1:])
        cut = int(np.argmax(saved))
        if best is None or saved[cut] > best[0]:
            best = float(saved[cut]), ordered[: cut + 1], ordered[cut + 1 :]
    assert best is not None
    return -best[0], number, best[1], best[2]


def _cost(q: Array, sigma: Array) -> Array:
    exponent = np.minimum(sigma**-2.0, _LARGEST_EXPONENT)
    cost: Array = np.log1p(q * q * np.expm1(exponent))
    return cost
