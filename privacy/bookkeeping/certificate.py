"""Upper bounds of per-unit gradient norms that hold in floating point.

A norm that is computed in float32 from Gram matrices can come out as 0 where the truth is large: the terms cancel, or
underflow. Clipping by such a norm breaks the sensitivity. The bounds below are what the exact norm cannot exceed,
whatever order the sums were taken in; they cost a few numbers per unit beside the Gram itself.

Notation (Higham, Accuracy and Stability of Numerical Algorithms, §3.1): u = 2^-24, γ_n = nu/(1 − nu). A dot product of
n terms in float32 is off by at most γ_n Σ|x_i||y_i|, plus n·η for underflow, η = 2^-126 (products flushed to 0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

UNIT_ROUNDOFF = 2.0**-24
UNDERFLOW = 2.0**-126


def gamma(terms: int) -> float:
    """Return γ_n, the relative error of a float32 sum of ``terms`` products; infinite where it has no bound."""
    nu = terms * UNIT_ROUNDOFF
    return nu / (1.0 - nu) if nu < 0.5 else math.inf


def row_norms(x: Tensor) -> Tensor:
    """Return the L2 norms over the last axis, float32, no more than γ_(D+2) below the truth whatever underflows."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return norms + math.sqrt(x.shape[-1] * UNDERFLOW)


@dataclass(frozen=True)
class Materialised:
    """A per-unit gradient that exists: what is clipped is what is summed.

    norm_U: float64, its L2 norm from float32 row norms of ``terms`` values each, over ``rows`` rows.
    """

    norm_U: Tensor
    terms: int
    rows: int

    def square(self) -> Tensor:
        """Return an upper bound of the squared norm, float64 [U]."""
        return self.norm_U.square() * (1.0 + 3.0 * gamma(self.terms + 2)) + self.rows * self.terms * UNDERFLOW


@dataclass(frozen=True)
class SingleRow:
    """A gradient x ⊗ δ of one row: its norm is ‖x‖‖δ‖, no sum that could cancel.

    x_U, delta_U: float32 row norms by :func:`row_norms`, of at most ``terms`` values.
    """

    x_U: Tensor
    delta_U: Tensor
    terms: int


@dataclass(frozen=True)
class Gram:
    """A gradient Σ_t x_t ⊗ δ_t whose squared norm is Σ_ts ⟨x_t, x_s⟩⟨δ_t, δ_s⟩, in float32.

    gram_U: that sum. spread_U: S² with S = Σ_t ‖x_t‖‖δ_t‖. x_U, delta_U: (Σ_t ‖x_t‖)², (Σ_t ‖δ_t‖)². All float64; of
    several ``matrices``, each is added up over them. width_x, width_delta, rows: sizes; rows is the largest T.
    """

    gram_U: Tensor
    spread_U: Tensor
    x_U: Tensor
    delta_U: Tensor
    width_x: int
    width_delta: int
    rows: int
    matrices: int = 1


Measured = Materialised | SingleRow | Gram


def squared_bounds(measured: Sequence[Measured]) -> Tensor:
    """Return upper bounds of the squared norms, float64 [len(measured), U].

    For a Gram of T rows of width d_x and d_δ, with n = d_x + d_δ + 2T + 16 (docs/privacy.md, rule 5):
    ``gram + γ_n S² + η(d_x(Σ‖δ‖)² + d_δ(Σ‖x‖)² + T²)``. The float32 errors of S and of the norms enter as a factor on
    terms that are corrections already.
    """
    if not measured:
        return torch.zeros(0, 0, dtype=torch.float64)
    squares: list[Tensor | None] = [m.square() if isinstance(m, Materialised) else None for m in measured]
    _fill_single_rows(measured, squares)
    _fill_grams(measured, squares)
    return torch.stack([square for square in squares if square is not None])


def _fill_single_rows(measured: Sequence[Measured], squares: list[Tensor | None]) -> None:
    chosen = [(i, m) for i, m in enumerate(measured) if isinstance(m, SingleRow)]
    if not chosen:
        return
    norm_LU = torch.stack([m.x_U for _, m in chosen]).double() * torch.stack([m.delta_U for _, m in chosen]).double()
    slack_L = torch.tensor([[1.0 + 3.0 * gamma(m.terms + 4)] for _, m in chosen], dtype=torch.float64)
    square_LU = norm_LU.square() * slack_L.to(norm_LU.device)
    for (i, _), square_U in zip(chosen, square_LU, strict=True):
        squares[i] = square_U


def _fill_grams(measured: Sequence[Measured], squares: list[Tensor | None]) -> None:
    chosen = [(i, m) for i, m in enumerate(measured) if isinstance(m, Gram)]
    if not chosen:
        return
    first = chosen[0][1].gram_U
    constants = torch.tensor([_constants(m) for _, m in chosen], dtype=torch.float64, device=first.device)
    spread, by_x, by_delta, plain = constants.unsqueeze(-1).unbind(1)
    square_LU = (
        torch.stack([m.gram_U for _, m in chosen]).clamp(min=0.0)  # rounding may have made it negative
        + torch.stack([m.spread_U for _, m in chosen]) * spread
        + torch.stack([m.x_U for _, m in chosen]) * by_x
        + torch.stack([m.delta_U for _, m in chosen]) * by_delta
        + plain
    )
    for (i, _), square_U in zip(chosen, square_LU, strict=True):
        squares[i] = square_U


def _constants(m: Gram) -> tuple[float, float, float, float]:
    terms = m.width_x + m.width_delta + 2 * m.rows + 16
    slack = 1.0 + 8.0 * gamma(terms)  # S and the norms were themselves computed in float32
    return (
        gamma(terms) * slack,
        UNDERFLOW * m.width_delta * slack,
        UNDERFLOW * m.width_x * slack,
        UNDERFLOW * m.rows**2 * m.matrices * slack,
    )
