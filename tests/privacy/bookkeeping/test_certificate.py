"""Bounds that must hold where float32 Gram matrices do not: cancellation, underflow, overflow."""

from __future__ import annotations

import math

import pytest
import torch
from opacus.grad_sample import GradSampleHooksFastGradientClipping
from torch import nn

from conclave.privacy.bookkeeping import Bookkeeper, Units
from conclave.privacy.bookkeeping.certificate import Gram, gamma, squared_bounds
from conclave.privacy.bookkeeping.contributions import Experts, Lookup, Matrix, TiedTable
from conclave.privacy.bookkeeping.ragged import Segments
from conclave.privacy.bookkeeping.shared import Factor

WIDE = 200  # so wide that a few rows are told from Gram matrices, not materialised


def cancelling(scale=1024.0):
    """Two rows whose contributions nearly cancel.

    With a power of two for scale every sum but that of (1 + 2^-13)², which loses 2^-26, is exact in whatever order a
    processor adds: the Gram matrices say exactly 0 everywhere.
    """
    x = torch.full((1, 1, WIDE), scale)
    x_ULD = torch.cat([x, x * (1 + 2.0**-13)], dim=1)
    delta_ULO = torch.cat([torch.ones(1, 1, WIDE), -torch.ones(1, 1, WIDE)], dim=1)
    return x_ULD, delta_ULO


def underflowing():
    """Every product of two values of x is 0 in float32."""
    return torch.full((1, 2, WIDE), 2.5e-23), torch.full((1, 2, WIDE), 1e18)


def crafted():
    generator = torch.Generator().manual_seed(2)
    for scale_x, scale_delta in ((1e-30, 1e15), (1e-20, 1e20), (1e12, 1e-30), (1.0, 1.0), (1e-38, 1e38)):
        x_ULD = torch.randn(3, 4, WIDE, generator=generator) * scale_x
        delta_ULO = torch.randn(3, 4, WIDE, generator=generator) * scale_delta
        yield x_ULD, delta_ULO
        yield x_ULD[:, :1].expand(-1, 4, -1), delta_ULO - delta_ULO.mean(1, keepdim=True)  # the rows cancel


def truth(x_ULD, delta_ULO):
    return torch.bmm(delta_ULO.double().transpose(1, 2), x_ULD.double()).flatten(1).norm(dim=1)


def dense_bound(x_ULD, delta_ULO):
    return squared_bounds([Matrix(Factor(delta_ULO), Factor(x_ULD), torch.Size((WIDE, WIDE))).measure()])[0].sqrt()


def experts_bound(x_ULD, delta_ULO):
    units, rows = x_ULD.shape[:2]
    unit_N = torch.arange(units).repeat_interleave(rows)
    segments = Segments(torch.tensor([units * rows], dtype=torch.int32), unit_N, units)
    return squared_bounds([Experts(x_ULD.flatten(0, 1), delta_ULO.flatten(0, 1), segments).measure()])[0].sqrt()


def tied_bound(x_ULD, delta_ULO):
    """The same rows as one look-up each and one dense use."""
    ids = torch.zeros(x_ULD.shape[:2], dtype=torch.int64)
    lookup = Lookup(ids, torch.zeros_like(x_ULD), WIDE)
    matrix = Matrix(Factor(delta_ULO), Factor(x_ULD), torch.Size((WIDE, WIDE)))
    return squared_bounds([TiedTable(lookup, matrix).measure()])[0].sqrt()


@pytest.mark.parametrize("bound", [dense_bound, experts_bound, tied_bound])
def test_a_bound_is_never_below_the_truth(bound):
    for x_ULD, delta_ULO in [cancelling(), cancelling(2.0**33), underflowing(), *crafted()]:
        exact_U, bound_U = truth(x_ULD, delta_ULO), bound(x_ULD, delta_ULO)
        assert ((bound_U >= exact_U) | bound_U.isnan()).all()


def test_gram_matrices_alone_would_have_said_zero():
    """What the certificate is for: the very inputs above, without it."""
    for x_ULD, delta_ULO in (cancelling(), underflowing()):
        gram_U = (torch.bmm(x_ULD, x_ULD.mT) * torch.bmm(delta_ULO, delta_ULO.mT)).sum((1, 2)).clamp(min=0).sqrt()
        assert float(gram_U[0]) < 0.5 * float(truth(x_ULD, delta_ULO)[0])
        assert float(dense_bound(x_ULD, delta_ULO)[0]) >= float(truth(x_ULD, delta_ULO)[0])


class Crafted(nn.Module):
    """A model whose weights a server chose: the layer's input and output gradient are what it likes."""

    def __init__(self, x_ULD, delta_ULO):
        super().__init__()
        self.layer = nn.Linear(x_ULD.shape[-1], delta_ULO.shape[-1], bias=False)
        self.delta_ULO = delta_ULO

    def loss(self, batch):
        return (self.layer(batch["x"]) * self.delta_ULO).sum((1, 2))


@pytest.mark.parametrize("make", [cancelling, underflowing])
def test_opacus_ghost_norms_break_the_clip_bound_and_ours_do_not(make):
    x_ULD, delta_ULO = make()
    exact = float(truth(x_ULD, delta_ULO)[0])
    clip = 0.1 * exact
    model = Crafted(x_ULD, delta_ULO)
    hooks = GradSampleHooksFastGradientClipping(model, loss_reduction="sum", max_grad_norm=clip)
    with pytest.warns(UserWarning, match="Full backward hook is firing"):
        model.loss({"x": x_ULD}).sum().backward()
    ghost_factor = float(hooks.get_clipping_coef()[0])
    hooks.cleanup()
    model.layer.weight.grad = None
    found = Bookkeeper(model).gradients(lambda: model.loss({"x": x_ULD}), Units.one_each(1))
    ours = min(1.0, clip / float(found.squared_bound_PU.sum().sqrt()))
    assert ghost_factor * exact > 2.0 * clip
    assert ours * exact <= clip


def test_overflow_makes_a_unit_unusable_not_small():
    x_ULD, delta_ULO = torch.full((1, 2, WIDE), 1e30), torch.full((1, 2, WIDE), 1e30)
    assert not bool(dense_bound(x_ULD, delta_ULO).isfinite())
    assert not bool(experts_bound(x_ULD, delta_ULO).isfinite())


def test_padding_does_not_carry_another_units_infinities_over():
    """Segments of 5 and 6 rows share a bucket: the first is padded with a row of the second, which is inf."""
    segments = Segments(torch.tensor([11], dtype=torch.int32), torch.tensor([0] * 5 + [1] * 6), 2)
    assert [bucket.length for bucket in segments.buckets(2).members] == [6]
    x_ND, delta_NO = torch.ones(11, 4), torch.ones(11, 4)
    x_ND[5:] = math.inf
    bound_U = squared_bounds([Experts(x_ND, delta_NO, segments).measure()])[0]
    assert not bool(bound_U[1].isfinite())
    assert float(bound_U[0].sqrt()) == pytest.approx(20.0, rel=1e-3)  # 5 rows of ones: a 4×4 matrix of fives


def test_the_terms_of_the_bound():
    """The formula in closed form, term by term (docs/privacy.md, rule 5)."""
    one, none = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    eta, n = 2.0**-126, 30 + 20 + 2 * 7 + 16
    for parts, expected in (
        ((one, none, none, none), 1.0 + 49 * eta),
        ((none, one, none, none), gamma(n)),
        ((none, none, one, none), (20 + 49) * eta),  # (Σ‖x‖)² goes with the width of δ
        ((none, none, none, one), (30 + 49) * eta),
        ((-one, none, none, none), 49 * eta),
    ):
        bound = float(squared_bounds([Gram(*parts, width_x=30, width_delta=20, rows=7)])[0, 0])
        assert expected <= bound <= expected * 1.001


def test_gamma_has_no_value_where_there_is_no_bound():
    assert gamma(1) == pytest.approx(2.0**-24, rel=1e-6)
    assert gamma(1 << 23) == math.inf
