"""Rows sent to experts, grouped by (expert, unit): segments of uneven length, padded in buckets of similar length.

What one unit sends to one expert is short, so Gram matrices of segments are small: that is what makes differential
privacy cheap for sparse experts. Padding every segment to the longest one would give most of it away again.

Dimension suffixes: N rows, S segments (of a bucket, or all in bucket order), L rows of a segment, D width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Bucket:
    """Segments of similar length.

    index: int64 [S·L], row of each place; some row where padded. padding: the places that are padded.
    expert_S, unit_S: whose segment it is.
    """

    index: Tensor
    padding: Tensor
    expert_S: Tensor
    unit_S: Tensor
    length: int


class Segments:
    """The segments of one dispatch.

    unit_N: unit of each row. offsets_E: int32, exclusive end of each expert's rows, sorted by expert.
    """

    def __init__(self, offsets_E: Tensor, unit_N: Tensor, units: int) -> None:
        self.offsets_E, self.unit_N, self.units = offsets_E, unit_N, units
        self.held = len(offsets_E)
        rows = torch.arange(len(unit_N), device=unit_N.device)
        self.expert_N = torch.searchsorted(offsets_E.long(), rows, right=True)
        key_N = self.expert_N * max(units, 1) + unit_N
        # Rows arrive sorted by (expert, unit), or nearly: a stable sort costs little and makes no assumption.
        sorted_key_N, self._order_N = torch.sort(key_N, stable=True)
        self._key_S, self._length_S = torch.unique_consecutive(sorted_key_N, return_counts=True)
        self.longest = int(self._length_S.max()) if len(self._length_S) else 0

    @cached_property
    def buckets(self) -> list[Bucket]:
        """The segments by length, shortest first."""
        start_S = self._length_S.cumsum(0) - self._length_S
        ceiling_S = _ceilings(self._length_S)
        return [self._bucket(start_S, ceiling_S == length, int(length)) for length in torch.unique(ceiling_S).tolist()]

    def _bucket(self, start_S: Tensor, chosen_S: Tensor, length: int) -> Bucket:
        place_L = torch.arange(length, device=start_S.device)
        place_SL = start_S[chosen_S, None] + place_L
        padding = (place_L >= self._length_S[chosen_S, None]).flatten().nonzero().squeeze(1)
        index = self._order_N[place_SL.flatten().clamp(max=len(self._order_N) - 1)]
        key_S = self._key_S[chosen_S]
        return Bucket(index, padding, key_S // self.units, key_S % self.units, length)

    @cached_property
    def unit_of_segment(self) -> Tensor:
        """Unit of every segment, in the order of the buckets."""
        if not self.buckets:
            return self.unit_N[:0]
        return torch.cat([bucket.unit_S for bucket in self.buckets])

    def padded(self, bucket: Bucket, x_ND: Tensor) -> Tensor:
        """Return the bucket's rows, [S, L, D], exact zeros where padded."""
        rows = x_ND.index_select(0, bucket.index)
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


def _ceilings(length_S: Tensor) -> Tensor:
    """Round lengths up to at most a quarter more: 1 to 8, 10, 12, 14, 16, 20, 24 and so on."""
    step_S = torch.exp2((length_S.double().log2().floor() - 2).clamp(min=0)).long()
    return (length_S + step_S - 1) // step_S * step_S
