"""Numeric level strict: on a grid, in integers, and immune to weights that amplify rounding."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import make_batch, make_config
from torch import nn

from conclave.model.building import build
from conclave.model.experts.stacked import GroupedLinear
from conclave.privacy.bookkeeping import Units
from conclave.privacy.gradients.clipping import SHRINK
from conclave.privacy.gradients.modes import GRID_BITS, Clipping, mode_for
from conclave.privacy.randomness import derive
from conclave.privacy.training.dpsgd_mechanism import DpSgd
from conclave.privacy.training.unit_optimizer import UnitDPOptimizer

CLIP = 0.5


def sums(mode, module, loss, batch, units):
    attached = mode_for(mode, module)
    found = attached.clipped_sum(loss, batch, Units.one_each(units), Clipping("flat", CLIP))
    attached.close()
    return found.sums


def without(batch, unit):
    keep = torch.arange(len(next(iter(batch.values())))) != unit
    return {name: tensor[keep] for name, tensor in batch.items()}


def test_a_contribution_has_the_same_bits_whoever_else_is_there():
    network, batch = build(make_config(), seed=3), make_batch(8)
    everyone = sums("strict", network, network.loss, batch, 8)
    apart = [sums("strict", network, network.loss, {n: t[u : u + 1] for n, t in batch.items()}, 1) for u in range(8)]
    for number, total in enumerate(everyone):
        assert total.dtype == torch.int64
        assert torch.equal(total, torch.stack([mine[number] for mine in apart]).sum(0))


def test_a_contribution_on_the_grid_is_within_the_bound():
    network, batch = build(make_config(), seed=3), make_batch(8)
    for unit in range(8):
        mine = sums("strict", network, network.loss, {n: t[unit : unit + 1] for n, t in batch.items()}, 1)
        norm = math.sqrt(sum(float((t.double() * CLIP * 2.0**-GRID_BITS).square().sum()) for t in mine))
        assert 0.99 * CLIP < norm <= CLIP


def test_a_contribution_is_rounded_toward_zero():
    network, batch = build(make_config(), seed=3), make_batch(1)
    mine = sums("strict", network, network.loss, batch, 1)
    gradients = torch.autograd.grad(network.loss(batch).mean(), list(network.parameters()))
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    for steps, gradient in zip(mine, gradients, strict=True):
        exact = gradient.double() * (SHRINK * CLIP / norm) / (CLIP * 2.0**-GRID_BITS)
        assert norm > CLIP
        assert (steps.double().abs() <= exact.abs() * (1 + 1e-12)).all()
        assert (exact.abs() * (1 - 1e-12) - steps.double().abs() < 1.0).all()


class Amplifier(nn.Module):
    """Crafted: the last bits of an expert's product, times 2^40, decide the gradient.

    Rows of other units change how the product is blocked, and with it those bits.
    """

    def __init__(self, experts=64, width=48):
        super().__init__()
        self.experts = experts
        self.first = GroupedLinear(experts, width, width)
        self.second = GroupedLinear(experts, width, 8)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            self.first.weight.copy_(torch.randn(self.first.weight.shape, generator=generator))
            self.second.weight.copy_(torch.randn(self.second.weight.shape, generator=generator))

    def loss(self, batch):
        x_BED = batch["x"]
        units, experts, width = x_BED.shape
        rows = x_BED.transpose(0, 1).reshape(-1, width)  # sorted by (expert, unit)
        offsets = torch.arange(1, experts + 1, dtype=torch.int32) * units
        example = torch.arange(units).repeat(experts)
        hidden = self.first(rows, offsets, example, torch.arange(units))
        # The exact value is public to whoever crafts the weights; what is left is rounding.
        exact = torch.einsum("ned,edo->neo", x_BED.double(), self.first.weight.double()).float()
        rest = (hidden - exact.transpose(0, 1).reshape(-1, width).detach()) * 2.0**40
        out = self.second(torch.tanh(rest), offsets, example, torch.arange(units))
        return out.view(experts, units, -1).sum((0, 2))


def moved_by_one_unit(mode, model, batch):
    units = len(batch["x"])
    every = sums(mode, model, model.loss, batch, units)
    fewer = sums(mode, model, model.loss, without(batch, units - 1), units - 1)
    unit = CLIP * 2.0**-GRID_BITS if mode == "strict" else 1.0
    return math.sqrt(sum(float(((a - b).double() * unit).square().sum()) for a, b in zip(every, fewer, strict=True)))


def amplified():
    """The crafted model, and two units: every expert goes from one row to two."""
    model = Amplifier()
    return model, {"x": torch.randn(2, model.experts, 48, generator=torch.Generator().manual_seed(5))}


def test_weights_that_amplify_rounding_do_not_break_strict():
    assert moved_by_one_unit("strict", *amplified()) <= CLIP


def test_weights_that_amplify_rounding_break_fast():
    """Why strict exists: a row has other last bits alone than among others, on most processors."""
    model, batch = amplified()
    alone = torch.einsum("nd,ndo->no", batch["x"][0], model.first.weight)
    rows, offsets = batch["x"].transpose(0, 1).reshape(-1, 48), torch.arange(1, 65, dtype=torch.int32)
    single = model.first(batch["x"][0], offsets, torch.zeros(64, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    both = model.first(rows, 2 * offsets, torch.arange(2).repeat(64), torch.arange(2))
    assert torch.allclose(single, alone, atol=1e-4)
    if torch.equal(single, both[::2]):
        pytest.skip("this processor's products give a row the same bits alone and among others")
    assert moved_by_one_unit("hooks", model, batch) > 1.05 * CLIP  # Opacus's mode: the other unit's share moved too


def test_noise_is_rounded_onto_the_grid_of_the_sum_and_has_the_stated_size():
    module = nn.Linear(200, 100, bias=False)
    mechanism = DpSgd(
        steps=1,
        learning_rate=1.0,
        sampling_rate=0.5,
        clip=CLIP,
        noise_multiplier=2.0,
        declared_size=8,
        numeric="strict",
    )
    optimizer = UnitDPOptimizer(torch.optim.SGD(module.parameters(), lr=1.0), mechanism)
    optimizer.accumulate(list(module.parameters()), [torch.full((100, 200), 3, dtype=torch.int64)])
    optimizer.accumulate(list(module.parameters()), [torch.full((100, 200), 4, dtype=torch.int64)])
    optimizer.noise_secret = derive(bytes(32), "strict noise")
    optimizer.add_noise()
    steps = module.weight.grad.double() * mechanism.divisor / (CLIP * 2.0**-GRID_BITS) - 7
    # float32 keeps 24 bits of a value of about 2^31 steps: on the grid to within that.
    spread = float((steps / 2.0**GRID_BITS).std())
    assert abs(spread / 2.0 - 1.0) < 5 / math.sqrt(2 * steps.numel())  # five standard errors: false alarm 6e-7
    with_double = nn.Linear(200, 100, bias=False).double()
    optimizer = UnitDPOptimizer(
        torch.optim.SGD(with_double.parameters(), lr=1.0), replace(mechanism, sampling_rate=1.0, declared_size=1)
    )
    optimizer.noise_secret = derive(bytes(32), "strict noise")
    optimizer.add_noise()
    on_grid = with_double.weight.grad / (CLIP * 2.0**-GRID_BITS)
    assert torch.equal(on_grid, on_grid.round())
