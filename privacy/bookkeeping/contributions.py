"""Per-unit gradients of one parameter: how large they are, and their weighted sum.

Every kind answers three questions: ``measure`` (a certified bound of each unit's norm), ``weighted`` (Σ_u f_u g_u) and
``per_unit`` (each g_u, for checks and for what cannot be computed otherwise).

Dimension suffixes: U units, L rows of a unit, N rows, D and O widths, E experts, V table size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Size, Tensor

from conclave.privacy.bookkeeping.certificate import Gram, Materialised, Measured, SingleRow, row_norms
from conclave.privacy.bookkeeping.ragged import Segments
from conclave.privacy.bookkeeping.shared import Factor, joined
from conclave.privacy.bookkeeping.weights import Weights

DIRECT_ADVANTAGE = 40
"""A value of a materialised gradient costs about as much as 40 multiply-adds of a Gram matrix: it is memory traffic."""

FINE_BUCKETS = 2_000_000
"""From so many values on, padding costs more than the calls that finer buckets of segments take."""


class Contribution(ABC):
    """The per-unit gradients of one parameter."""

    @abstractmethod
    def measure(self) -> Measured:
        """Bound the norm of each unit's gradient. Called once, before :meth:`weighted`."""

    @abstractmethod
    def weighted(self, weights: Weights) -> Tensor:
        """Return Σ_u factor_u · g_u in the parameter's shape, float32 or wider."""

    @abstractmethod
    def per_unit(self) -> Tensor:
        """Return every unit's gradient, [U, *shape]."""


class PerUnit(Contribution):
    """Gradients that are small, or already there: norm gains, biases, scalars, layers without a rule."""

    def __init__(self, gradient_U: Tensor) -> None:
        self._gradient_U = gradient_U

    def measure(self) -> Measured:
        """Take norms of the gradients themselves."""
        return measure_materialised(self._gradient_U)

    def weighted(self, weights: Weights) -> Tensor:
        """Add them up."""
        return weights.total(self._gradient_U)

    def per_unit(self) -> Tensor:
        """Return them."""
        return self._gradient_U


def measure_materialised(gradient_U: Tensor) -> Materialised:
    """Norms in two levels: in float32 along the last axis, in float64 over the rest."""
    last = gradient_U.shape[-1] if gradient_U.dim() > 1 else 1
    flat_URD = gradient_U.reshape(len(gradient_U), math.prod(gradient_U.shape[1:-1]), last)
    inner_UR = torch.linalg.vector_norm(flat_URD, dim=-1)
    norm_U = torch.linalg.vector_norm(inner_UR, dim=-1, dtype=torch.float64)
    return Materialised(norm_U, terms=flat_URD.shape[-1], rows=flat_URD.shape[1])


class Matrix(Contribution):
    """g_u = Σ_t δ_t ⊗ x_t of a dense layer: materialised or computed from Gram matrices, whichever costs less."""

    def __init__(self, delta: Factor, x: Factor, shape: Size) -> None:
        self.delta, self.x, self.shape = delta, x, shape
        self._gradient_U: Tensor | None = None

    def measure(self) -> Measured:
        """Materialise, or use Gram matrices; a single row is neither."""
        rows, width_delta = self.delta.rows_ULD.shape[1:]
        width_x = self.x.rows_ULD.shape[-1]
        if rows == 1:
            return SingleRow(self.x.norms[:, 0], self.delta.norms[:, 0], max(width_x, width_delta))
        if DIRECT_ADVANTAGE * width_x * width_delta < rows * rows * (width_x + width_delta):
            self._gradient_U = self.per_unit()
            self.delta = self.x = Factor(self._gradient_U[:, :0])  # the rows are free while the backward pass goes on
            return measure_materialised(self._gradient_U)
        return Gram(
            gram_U=(self.x.gram * self.delta.gram).sum(2).sum(1).double(),
            spread_U=(self.x.norms * self.delta.norms).sum(1).double().square(),
            x_U=self.x.norms.sum(1).double().square(),
            delta_U=self.delta.norms.sum(1).double().square(),
            width_x=width_x,
            width_delta=width_delta,
            rows=rows,
        )

    def weighted(self, weights: Weights) -> Tensor:
        """One product over all rows, or the weighted sum of what was materialised."""
        if self._gradient_U is not None:
            return weights.total(self._gradient_U)
        delta_ULO, x_ULD = self.delta.rows_ULD, self.x.rows_ULD
        if delta_ULO.shape[-1] <= x_ULD.shape[-1]:
            delta_ULO, x_ULD = weights.apply(delta_ULO), weights.select(x_ULD)
        else:
            delta_ULO, x_ULD = weights.select(delta_ULO), weights.apply(x_ULD)
        return (delta_ULO.flatten(0, 1).t() @ x_ULD.flatten(0, 1)).view(self.shape)

    def per_unit(self) -> Tensor:
        """Return [U, *shape]."""
        if self._gradient_U is not None:
            return self._gradient_U
        return torch.bmm(self.delta.rows_ULD.transpose(1, 2), self.x.rows_ULD).view(-1, *self.shape)


class Lookup(Contribution):
    """The gradient of a table of V rows: each use adds its output gradient to the row that was looked up."""

    def __init__(self, id_UL: Tensor, delta_ULD: Tensor, table_rows: int) -> None:
        self.id_UL, self.delta_ULD, self.table_rows = id_UL, delta_ULD, table_rows

    def measure(self) -> Measured:
        """Add up the uses of each (unit, row): what is clipped is what is summed."""
        units, length = self.id_UL.shape
        width = self.delta_ULD.shape[-1]
        key_UL = torch.arange(units, device=self.id_UL.device)[:, None] * self.table_rows + self.id_UL
        self._key_S, place_N = torch.unique(key_UL.flatten(), return_inverse=True)
        flat_ND = self.delta_ULD.reshape(-1, width)
        self._gradient_SD = flat_ND.new_zeros(len(self._key_S), width).index_add_(0, place_N, flat_ND)
        square_S = torch.linalg.vector_norm(self._gradient_SD, dim=-1).double().square()
        norm_U = square_S.new_zeros(units).index_add_(0, self._key_S // self.table_rows, square_S).sqrt()
        return Materialised(norm_U, terms=width, rows=length)

    def weighted(self, weights: Weights) -> Tensor:
        """Add the weighted rows into one table."""
        gradient_SD = weights.apply(self._gradient_SD, self._key_S // self.table_rows)
        table = gradient_SD.new_zeros(self.table_rows, gradient_SD.shape[1])
        return table.index_add_(0, self._key_S % self.table_rows, gradient_SD)

    def per_unit(self) -> Tensor:
        """Return [U, V, D]."""
        units, _, width = self.delta_ULD.shape
        table_UVD = self.delta_ULD.new_zeros(units, self.table_rows, width)
        return table_UVD.scatter_add_(1, self.id_UL.unsqueeze(-1).expand(-1, -1, width), self.delta_ULD)


class TiedTable(Contribution):
    """A table used for looking up and, transposed, as a dense layer: embedding and head of one parameter.

    The joint Gram has three parts: among dense uses, among look-ups, and between the two, where ⟨one-hot, δ⟩ is the
    δ of the row that was looked up.
    """

    def __init__(self, lookup: Lookup, matrix: Matrix) -> None:
        self._lookup, self._matrix = lookup, matrix

    def measure(self) -> Measured:
        """Take the joint Gram of both uses."""
        id_UL, looked_ULD = self._lookup.id_UL, self._lookup.delta_ULD
        delta, x = self._matrix.delta, self._matrix.x
        self._lookup.measure()  # for the weighted sum
        same_ULL = id_UL.unsqueeze(1) == id_UL.unsqueeze(2)
        ids_U = (torch.bmm(looked_ULD, looked_ULD.transpose(1, 2)) * same_ULL).sum(2).sum(1)
        picked_UML = delta.rows_ULD.gather(2, id_UL.unsqueeze(1).expand(-1, delta.rows_ULD.shape[1], -1))
        cross_U = (picked_UML * torch.bmm(x.rows_ULD, looked_ULD.transpose(1, 2))).sum(2).sum(1)
        dense_U = (delta.gram * x.gram).sum(2).sum(1)
        looked_U = row_norms(looked_ULD).sum(1).double()
        return Gram(
            gram_U=dense_U.double() + ids_U.double() + 2.0 * cross_U.double(),
            spread_U=(looked_U + (delta.norms * x.norms).sum(1).double()).square(),
            x_U=(looked_U + x.norms.sum(1).double()).square(),
            delta_U=(id_UL.shape[1] + delta.norms.sum(1).double()).square(),
            width_x=looked_ULD.shape[-1],
            width_delta=delta.rows_ULD.shape[-1],
            rows=id_UL.shape[1] + delta.rows_ULD.shape[1],
        )

    def weighted(self, weights: Weights) -> Tensor:
        """Add the sums of both uses."""
        return self._lookup.weighted(weights) + self._matrix.weighted(weights)

    def per_unit(self) -> Tensor:
        """Return [U, V, D]."""
        return self._lookup.per_unit() + self._matrix.per_unit()


class Experts(Contribution):
    """Stacked experts [E, D, O]: rows grouped by (expert, unit); a unit without a row at an expert is zero there."""

    def __init__(self, x_ND: Tensor, delta_NO: Tensor, segments: Segments) -> None:
        self.x_ND, self.delta_NO, self.segments = x_ND, delta_NO, segments

    def measure(self) -> Measured:
        """Take the Gram matrices of every segment, bucket by bucket, and add them up by unit."""
        seg = self.segments
        if seg.longest <= 1:
            return self._measure_single_rows()
        width_x, width_delta = self.x_ND.shape[1], self.delta_NO.shape[1]
        rows = len(seg.unit_N)
        buckets = seg.buckets(4 if rows * (width_x + width_delta) > FINE_BUCKETS else 2)
        parts: list[list[Tensor]] = [[], [], [], []]
        for bucket in buckets.members:
            x_SLD, delta_SLO = seg.padded(bucket, self.x_ND), seg.padded(bucket, self.delta_NO, place=1)
            gram_SLL = torch.bmm(x_SLD, x_SLD.transpose(1, 2)).mul_(torch.bmm(delta_SLO, delta_SLO.transpose(1, 2)))
            norm_x_SL, norm_delta_SL = row_norms(x_SLD), row_norms(delta_SLO)  # while they are in the cache
            found = (gram_SLL.sum(2), norm_x_SL * norm_delta_SL, norm_x_SL, norm_delta_SL)
            for part, value_SL in zip(parts, found, strict=True):
                part.append(value_SL.sum(1))
        parts_4S = torch.stack([torch.cat(part) for part in parts]).double()
        parts_4S[1:] = parts_4S[1:].square()
        gram_U, spread_U, x_U, delta_U = parts_4S.new_zeros(4, seg.units).index_add_(1, buckets.unit_S, parts_4S)
        return Gram(gram_U, spread_U, x_U, delta_U, width_x, width_delta, rows=seg.longest, matrices=seg.held)

    def _measure_single_rows(self) -> Measured:
        """A segment of one row cannot cancel: the squares of the products add up over experts."""
        square_N = (row_norms(self.x_ND).double() * row_norms(self.delta_NO).double()).square()
        square_U = square_N.new_zeros(self.segments.units).index_add_(0, self.segments.unit_N, square_N)
        width = max(self.x_ND.shape[1], self.delta_NO.shape[1])
        return Materialised(square_U.sqrt(), terms=2 * width, rows=self.segments.held)

    def weighted(self, weights: Weights) -> Tensor:
        """One grouped product over all rows."""
        x_ND, delta_NO, unit_N = self.x_ND, self.delta_NO, self.segments.unit_N
        if x_ND.shape[1] <= delta_NO.shape[1]:
            x_ND, delta_NO = weights.apply(x_ND, unit_N), weights.select(delta_NO, unit_N)
        else:
            x_ND, delta_NO = weights.select(x_ND, unit_N), weights.apply(delta_NO, unit_N)
        return self.segments.product(x_ND, delta_NO)

    def per_unit(self) -> Tensor:
        """Return [U, E, D, O]."""
        seg = self.segments
        gradient_UEDO = self.x_ND.new_zeros(seg.units, seg.held, self.x_ND.shape[1], self.delta_NO.shape[1])
        for unit_S, expert_S, product_SDO in self.products():
            gradient_UEDO[unit_S, expert_S] = product_SDO
        return gradient_UEDO

    def products(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield, bucket by bucket, units [S], experts [S] and the gradient of each segment [S, D, O]."""
        seg = self.segments
        buckets, start = seg.buckets(4), 0
        for bucket in buckets.members:
            x_SLD, delta_SLO = seg.padded(bucket, self.x_ND), seg.padded(bucket, self.delta_NO, place=1)
            mine = slice(start, start + len(x_SLD))
            yield buckets.unit_S[mine], buckets.expert_S[mine], x_SLD.transpose(1, 2) @ delta_SLO
            start = mine.stop


def merge(uses: Sequence[Contribution]) -> Contribution:
    """Combine several uses of one parameter into one gradient: the norms of uses do not add up."""
    if len(uses) == 1:
        return uses[0]
    experts = [use for use in uses if isinstance(use, Experts)]
    if len(experts) == len(uses):
        return _merge_experts(experts)
    matrices = [use for use in uses if isinstance(use, Matrix)]
    lookups = [use for use in uses if isinstance(use, Lookup)]
    if len(matrices) + len(lookups) < len(uses):
        return PerUnit(torch.stack([use.per_unit() for use in uses]).sum(0))
    if not lookups:
        return _merge_matrices(matrices)
    if not matrices:
        return _merge_lookups(lookups)
    return TiedTable(_merge_lookups(lookups), _merge_matrices(matrices))


def _merge_matrices(uses: Sequence[Matrix]) -> Matrix:
    return Matrix(joined([use.delta for use in uses]), joined([use.x for use in uses]), uses[0].shape)


def _merge_experts(uses: Sequence[Experts]) -> Experts:
    """Put each expert's rows of all uses side by side."""
    offsets_E = torch.stack([use.segments.offsets_E for use in uses]).sum(0, dtype=torch.int32)
    order_N = torch.cat([use.segments.expert_N for use in uses]).argsort(stable=True)
    unit_N = torch.cat([use.segments.unit_N for use in uses])[order_N]
    return Experts(
        torch.cat([use.x_ND for use in uses])[order_N],
        torch.cat([use.delta_NO for use in uses])[order_N],
        Segments(offsets_E, unit_N, uses[0].segments.units),
    )


def _merge_lookups(uses: Sequence[Lookup]) -> Lookup:
    id_UL = torch.cat([use.id_UL for use in uses], dim=1)
    return Lookup(id_UL, torch.cat([use.delta_ULD for use in uses], dim=1), uses[0].table_rows)
