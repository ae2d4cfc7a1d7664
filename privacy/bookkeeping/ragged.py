"""Rows sent to experts, grouped by (expert, unit): segments of uneven length, padded in buckets of similar length.

What one unit sends to one expert is short, so Gram matrices of segments are small: that is what makes differential
privacy cheap for sparse experts. Padding every segment to the longest one would give most of it away again.

Dimension suffixes: N rows, S segments (of a bucket, or all in bucket order), L rows of a segment, D width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


class Scratch:
    """Memory that is reused. New memory costs a page fault per 4 KiB, more than filling it."""

    def __init__(self) -> None:
        self._places: dict[int, Tensor] = {}

    def take(self, place: int, size: int, like: Tensor) -> Tensor:
        """Return ``size`` values of the type and device of ``like``; what they hold is arbitrary."""
        have = self._places.get(place)
        if have is None or len(have) < size or have.dtype != like.dtype or have.device != like.device:
            have = self._places[place] = like.new_empty(size)
        return have[:size]


@dataclass(frozen=True)
class Bucket:
    """Segments of similar length.

    index: int64 [S·length], row of each place; some row where padded. padding: int64, the places that are padded.
    """

    index: Tensor
    padding: Tensor
    length: int


@dataclass(frozen=True)
class Buckets:
    """All segments in buckets, shortest first; unit_S and expert_S say in that order whose segment each is."""

    members: list[Bucket]
    unit_S: Tensor
    expert_S: Tensor


class Segments:
    """The segments of one dispatch.

    offsets_E: int32, exclusive end of each expert's rows. expert_N, unit_N: expert and unit of each row, int64.
    longest: rows of the longest.
    """

    def __init__(self, offsets_E: Tensor, unit_N: Tensor, units: int, scratch: Scratch | None = None) -> None:
        self.offsets_E, self.unit_N, self.units = offsets_E, unit_N, units
        self.held = len(offsets_E)
        rows = torch.arange(len(unit_N), device=unit_N.device)
        self.expert_N = torch.searchsorted(offsets_E.long(), rows, right=True)
        key_N = self.expert_N * max(units, 1) + unit_N
        # Rows arrive sorted by (expert, unit), or nearly: a stable sort costs little and makes no assumption.
        sorted_key_N, self._order_N = torch.sort(key_N, stable=True)
        self._key_S, self._length_S = torch.unique_consecutive(sorted_key_N, return_counts=True)
        self.count = len(self._key_S)
        self.longest = int(self._length_S.max()) if self.count else 0
        self._scratch = scratch or Scratch()
        self._buckets: dict[int, Buckets] = {}

    def buckets(self, steps: int) -> Buckets:
        """Return the segments by length, in ``steps`` buckets per doubling of the length."""
        if steps not in self._buckets:
            self._buckets[steps] = self._make_buckets(steps)
        return self._buckets[steps]

    def _make_buckets(self, steps: int) -> Buckets:
        # One pass over all buckets; each is then a slice of it.
        ceiling_S, order_S = torch.sort(_ceilings(self._length_S, steps), stable=True)
        start_S = (self._length_S.cumsum(0) - self._length_S)[order_S]
        first_S = ceiling_S.cumsum(0) - ceiling_S
        segment_P = torch.repeat_interleave(torch.arange(self.count, device=start_S.device), ceiling_S)
        within_P = torch.arange(len(segment_P), device=start_S.device) - first_S[segment_P]
        row_P = (start_S[segment_P] + within_P).clamp(max=len(self._order_N) - 1)
        index_P = self._order_N[row_P]
        padded_at = (within_P >= self._length_S[order_S][segment_P]).nonzero().squeeze(1)
        lengths, counts = torch.unique_consecutive(ceiling_S, return_counts=True)
        ends = (lengths * counts).cumsum(0)
        cuts = torch.searchsorted(padded_at, ends).tolist()
        members, start, cut = [], 0, 0
        for length, end, next_cut in zip(lengths.tolist(), ends.tolist(), cuts, strict=True):
            members.append(Bucket(index_P[start:end], padded_at[cut:next_cut] - start, length))
            start, cut = end, next_cut
        key_S = self._key_S[order_S]
        units = max(self.units, 1)
        return Buckets(members, key_S % units, key_S // units)

    def padded(self, bucket: Bucket, x_ND: Tensor, *, place: int = 0) -> Tensor:
        """Return the bucket's rows, [S, L, D], exact zeros where padded.

        The answer lies in scratch memory: it is good until the next call with the same ``place``.
        """
        rows = self._scratch.take(place, len(bucket.index) * x_ND.shape[1], x_ND).view(-1, x_ND.shape[1])
        torch.index_select(x_ND, 0, bucket.index, out=rows)
        rows.index_fill_(0, bucket.padding, 0.0)  # by selection: what stood there may be inf
        return rows.view(-1, bucket.length, x_ND.shape[1])

    def product(self, x_ND: Tensor, delta_NO: Tensor) -> Tensor:
        """Return Σ over each expert's rows of x ⊗ δ, [E, D, O]."""
        if x_ND.dtype == torch.float64 or not len(x_ND):  # grouped_mm refuses both
            out = x_ND.new_zeros(self.held, x_ND.shape[1], delta_NO.shape[1])
            start = 0
            for expert, end in enumerate(self.offsets_E.tolist()):
                out[expert] = x_ND[start:end].t() @ delta_NO[start:end]
                start = end
            return out
        return F.grouped_mm(x_ND.t(), delta_NO, offs=self.offsets_E)


def _ceilings(length_S: Tensor, steps: int) -> Tensor:
    """Round lengths up to 1, 2, 4, … and ``steps`` − 1 lengths between each two of them, where there are as many."""
    octave_S = length_S.double().log2().ceil()  # length ≤ 2^octave
    step_S = torch.exp2(octave_S - 1).div(steps).clamp(min=1.0).long()
    return (length_S + step_S - 1) // step_S * step_S
