"""DP-SGD: sensitivity, noise, selection, divisor, empty batches, replay."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import make_batch, make_config
from scipy import stats

from conclave.model.building import build
from conclave.privacy.gradients.clipping import SHRINK, clip_factors
from conclave.privacy.randomness import derive
from conclave.privacy.training.dpsgd import train_privately
from conclave.privacy.training.dpsgd_mechanism import DpSgd

SECRET = derive(bytes(32), "dpsgd test")
FULL = DpSgd(
    steps=1, learning_rate=1.0, sampling_rate=1.0, clip=0.5, noise_multiplier=1e-12, declared_size=10
)  # so little noise that the update shows the clipped sum; everyone is sampled
MODES = ("bookkeeping", "hooks", "ghost")


def update(batch, mechanism, secret=SECRET, config=None):
    """Clipped, noised, divided gradient of one step: minus the change of every parameter."""
    network = build(config or make_config(), seed=3)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    train_privately(network, network.loss, batch, mechanism, secret)
    return {name: before[name] - p.detach() for name, p in network.named_parameters()}


def joint(update) -> torch.Tensor:
    return torch.cat([tensor.double().flatten() for tensor in update.values()])


def without(batch, unit):
    keep = torch.arange(len(batch["label"])) != unit
    return {name: tensor[keep] for name, tensor in batch.items()}


@pytest.mark.parametrize("mode", MODES)
def test_the_sum_equals_microbatches_clipped_one_by_one(mode):
    batch, config = make_batch(6), make_config()
    network = build(config, seed=3)
    expected = 0.0
    for unit in range(6):
        network.zero_grad()
        network.loss({name: tensor[unit : unit + 1] for name, tensor in batch.items()}).sum().backward()
        gradient = torch.cat([p.grad.double().flatten() for p in network.parameters()])
        expected = expected + gradient * min(1.0, FULL.clip * SHRINK / float(gradient.norm()))
    actual = joint(update(batch, replace(FULL, gradients=mode))) * FULL.divisor
    assert float((actual - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_one_unit_moves_the_sum_by_at_most_the_clip_bound(mode):
    mechanism, batch = replace(FULL, gradients=mode), make_batch(8)
    everyone = joint(update(batch, mechanism)) * mechanism.divisor
    for unit in range(8):
        moved = float((everyone - joint(update(without(batch, unit), mechanism)) * mechanism.divisor).norm())
        assert 0.4 < moved / mechanism.clip <= 1.0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_an_unusable_unit_contributes_exactly_nothing(mode, poison):
    batch = {name: tensor.clone() for name, tensor in make_batch(5).items()}
    batch["image"][2] = poison
    mechanism = replace(FULL, gradients=mode)
    with_it, without_it = update(batch, mechanism), update(without(batch, 2), mechanism)
    for name, tensor in with_it.items():
        assert tensor.isfinite().all()
        torch.testing.assert_close(tensor, without_it[name], rtol=0, atol=0 if mode == "ghost" else 1e-9)


def test_factors_select_instead_of_multiplying():
    norm_B = torch.tensor([0.0, 0.25, 4.0, 2.0**60, 2.0**61, math.inf, math.nan], dtype=torch.float64)
    factor_B = clip_factors(norm_B, 1.0)
    assert factor_B.tolist() == [1.0, 1.0, SHRINK / 4.0, SHRINK * 2.0**-60, 0.0, 0.0, 0.0]
    assert (factor_B[:4] * norm_B[:4] <= 1.0).all()


@pytest.mark.parametrize("mode", MODES)
def test_every_parameter_is_noised_also_unrouted_experts_and_the_noise_has_the_stated_size(mode):
    config = make_config(routed=32, shared=0)
    mechanism = replace(FULL, noise_multiplier=3.0, clip=2.0, gradients=mode)
    routed = set(build(config, seed=3)(make_batch(2)).routing[0].experts_BTK.flatten().tolist())
    batch = make_batch(2)
    noise = {}
    quiet = update(batch, replace(mechanism, noise_multiplier=1e-12), config=config)
    for name, tensor in update(batch, mechanism, config=config).items():
        assert (tensor != 0).all(), name
        noise[name] = (tensor - quiet[name]).double() * mechanism.divisor / (3.0 * 2.0)
    untouched = [e for e in range(32) if e not in routed]
    assert len(untouched) > 16
    groups = {"all": joint(noise), "untouched": noise["blocks.0.moe.experts.up.weight"][untouched].flatten()}
    for name, values in groups.items():
        # χ² at 1e-6 per tail; with thousands of values it sees σ wrong by 5 %. The secret is fixed.
        law = stats.chi2(len(values))
        assert law.ppf(1e-6) < float(values.square().sum()) < law.ppf(1 - 1e-6), name
        assert stats.kstest(values.numpy(), "norm").pvalue > 1e-6, name
    assert len(groups["all"]) > 5000
    up, down = (noise[f"blocks.0.moe.experts.{layer}.weight"].flatten() for layer in ("up", "down"))
    assert len(up) == len(down)  # two parameters of one size would show the same noise twice
    assert abs(float(torch.corrcoef(torch.stack([up, down]))[0, 1])) < 5 / len(up) ** 0.5


def test_noise_differs_between_parameters_steps_and_secrets():
    mechanism = replace(FULL, noise_multiplier=1.0)
    one, other = joint(update(make_batch(3), mechanism)), joint(update(make_batch(3), mechanism, derive(SECRET, 1)))
    two_steps = joint(update(make_batch(3), replace(mechanism, steps=2)))
    second = two_steps - one
    for left, right in ((one, other), (one, second), (one[: len(one) // 2], one[len(one) // 2 :][: len(one) // 2])):
        assert abs(float(torch.corrcoef(torch.stack([left, right]))[0, 1])) < 5 / len(left) ** 0.5


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_batch_is_a_step_of_pure_noise(mode):
    nobody = {name: tensor[:0] for name, tensor in make_batch(1).items()}
    mechanism = replace(FULL, noise_multiplier=2.0, gradients=mode)
    values = joint(update(nobody, mechanism)) * mechanism.divisor / (2.0 * mechanism.clip)
    law = stats.chi2(len(values))
    assert law.ppf(1e-6) < float(values.square().sum()) < law.ppf(1 - 1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_the_divisor_is_declared_not_counted(mode):
    mechanism = replace(FULL, gradients=mode)
    small, large = (
        joint(update(make_batch(4), mechanism)),
        joint(update(make_batch(4), replace(mechanism, declared_size=20))),
    )
    torch.testing.assert_close(small, large * 2.0, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_physical_batches_change_nothing(mode):
    batch = make_batch(9)
    whole = joint(update(batch, replace(FULL, gradients=mode)))
    for size in (1, 4):
        parts = joint(update(batch, replace(FULL, gradients=mode, physical_batch=size)))
        assert float((parts - whole).norm() / whole.norm()) < 1e-6


@pytest.mark.parametrize("mode", [*MODES, "strict"])
@pytest.mark.parametrize("count", [32, 33, 40])
def test_no_mode_minds_how_many_units_there_are(mode, count):
    """What fits into the memory is looked up for larger batches; Opacus's hooks then counted a pass too many."""
    batch = make_batch(count)
    how = {"numeric": "strict"} if mode == "strict" else {"gradients": mode}
    found = joint(update(batch, replace(FULL, **how)))
    told = joint(update(batch, replace(FULL, physical_batch=32, **how)))
    assert float((found - told).norm() / told.norm()) < 1e-6


def test_the_same_secret_replays_the_same_bytes():
    mechanism = replace(FULL, noise_multiplier=1.0, sampling_rate=0.5, steps=3)
    one, again = update(make_batch(12), mechanism), update(make_batch(12), mechanism)
    other = update(make_batch(12), mechanism, derive(SECRET, "other"))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_the_modes_agree_on_a_whole_run():
    mechanism = replace(FULL, noise_multiplier=1.0, sampling_rate=0.5, steps=4)
    hooks = joint(update(make_batch(16), mechanism))
    ghost = joint(update(make_batch(16), replace(mechanism, gradients="ghost")))
    assert float((hooks - ghost).norm() / hooks.norm()) < 1e-4


def test_the_model_is_left_clean():
    network = build(make_config(), seed=3)
    train_privately(network, network.loss, make_batch(4), FULL, SECRET)
    assert not any(module._forward_hooks or module._backward_hooks for module in network.modules())
    assert not any(hasattr(p, "grad_sample") for p in network.parameters())


def test_without_privacy_is_plain_sgd():
    network, twin = build(make_config(), seed=3), build(make_config(), seed=3)
    mechanism = replace(FULL, noise_multiplier=None, steps=2, learning_rate=0.1, physical_batch=4)
    train_privately(network, network.loss, make_batch(10), mechanism, SECRET)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        twin.loss(make_batch(10)).mean().backward()
        optimizer.step()
    for left, right in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(left, right)
