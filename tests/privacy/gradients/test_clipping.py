"""Kinds of clipping, in every mode, against microbatches clipped one by one; groups as units."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import make_batch, make_config
from microbatches import alone, relative_error
from torch import nn

from conclave.base.errors import BadInputError
from conclave.model.building import build
from conclave.model.layers.unit_random import UnitDropout
from conclave.privacy.gradients.clipping import SHRINK, SMALLEST_CLIP, STABILISER, AdaptiveClip, unit_factors
from conclave.privacy.gradients.unit_index import UnitIndex
from conclave.privacy.randomness import derive
from conclave.privacy.training.dpsgd import train_privately
from conclave.privacy.training.dpsgd_mechanism import DpSgd
from conclave.privacy.training.private_training import PrivateTraining
from conclave.privacy.training.unit_optimizer import UnitDPOptimizer

SECRET = derive(bytes(32), "clipping test")
FULL = DpSgd(
    steps=1, learning_rate=1.0, sampling_rate=1.0, clip=0.5, noise_multiplier=1e-12, declared_size=10
)  # so little noise that the update shows the clipped sum; everyone is sampled
GROUPS = torch.tensor([7, 7, 3, 3, 3, 9])
UNITS = {"record": None, "group": GROUPS}
MODES = {
    "bookkeeping": {"gradients": "bookkeeping"},
    "hooks": {"gradients": "hooks"},
    "strict": {"numeric": "strict"},
}


def clipped_sum(module, loss, batch, mechanism, group_B=None):
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    train_privately(module, loss, batch, mechanism, SECRET, group_B=group_B)
    after = dict(module.named_parameters())
    total = {name: (before[name] - after[name].detach()).double() * mechanism.divisor for name in before}
    module.load_state_dict(before)
    return total


def expected_sum(module, loss, batch, kind, clip, unit_B):
    truth = alone(module, loss, batch, unit_B)
    squares_PU = torch.stack([g.double().flatten(1).square().sum(1) for g in truth.values()])
    norm_U = squares_PU.sum(0).sqrt()
    total = {}
    for (name, p), square_U in zip(module.named_parameters(), squares_PU, strict=True):
        if kind == "per-layer":
            factor_U = (clip / math.sqrt(len(truth)) * SHRINK / square_U.sqrt().clamp(min=1e-30)).clamp(max=1.0)
        elif kind == "automatic":
            factor_U = clip * SHRINK / (norm_U + STABILISER)
        else:
            factor_U = (clip * SHRINK / norm_U).clamp(max=1.0)
        total[name] = torch.einsum("u,u...->...", factor_U, truth[p].double())
    return total


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("kind", ["flat", "per-layer", "automatic", "adaptive"])
@pytest.mark.parametrize("mode", MODES)
def test_the_sum_equals_microbatches_clipped_one_by_one(mode, kind, unit):
    network, batch = build(make_config(), seed=3), make_batch(6)
    numbers = torch.arange(6) if unit == "record" else torch.tensor([1, 1, 0, 0, 0, 2])
    expected = expected_sum(network, network.loss, batch, kind, FULL.clip, numbers)
    mechanism = replace(FULL, clipping=kind, records_per_unit=3 if unit == "group" else None, **MODES[mode])
    actual = clipped_sum(network, network.loss, batch, mechanism, UNITS[unit])
    joint = [torch.cat([t.flatten() for t in total.values()]) for total in (actual, expected)]
    # Certified bounds clip by up to 0.2 % more here; direction is exact, size within that.
    assert float(torch.nn.functional.cosine_similarity(*joint, dim=0)) > 1 - 1e-5
    assert 0.997 < float(joint[0].norm() / joint[1].norm()) <= 1.0 + 1e-6


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("kind", ["flat", "per-layer", "automatic", "adaptive"])
@pytest.mark.parametrize("mode", MODES)
def test_adding_a_unit_moves_the_sum_by_at_most_the_clip_bound(mode, kind, unit):
    network, batch = build(make_config(), seed=3), make_batch(6)
    mechanism = replace(FULL, clipping=kind, records_per_unit=3 if unit == "group" else None, **MODES[mode])
    everyone = clipped_sum(network, network.loss, batch, mechanism, UNITS[unit])
    keep_B = torch.arange(6) != 5 if unit == "record" else GROUPS != 3
    fewer = {name: tensor[keep_B] for name, tensor in batch.items()}
    without = clipped_sum(network, network.loss, fewer, mechanism, None if unit == "record" else GROUPS[keep_B])
    moved = math.sqrt(sum(float((everyone[name] - without[name]).square().sum()) for name in everyone))
    assert 0.3 * FULL.clip < moved <= FULL.clip


@pytest.mark.parametrize("kind", ["flat", "per-layer", "automatic"])
def test_one_unusable_parameter_leaves_the_unit_out_as_a_whole(kind):
    squared_PU = torch.tensor([[1.0, 4.0], [math.nan, 9.0]], dtype=torch.float64)
    factor_PU = unit_factors(squared_PU, kind, 1.0, parameters=2)
    assert factor_PU[:, 0].tolist() == [0.0, 0.0]
    assert (factor_PU[:, 1] > 0).all()
    assert float((factor_PU[:, 1].square() * squared_PU[:, 1]).sum()) <= 1.0


@pytest.mark.parametrize("mode", ["bookkeeping", "hooks", "strict"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_an_unusable_group_contributes_exactly_nothing(mode, poison):
    network = build(make_config(), seed=3)
    batch = {name: tensor.clone() for name, tensor in make_batch(6).items()}
    batch["image"][3] = poison  # one record of the group {2, 3, 4}
    mechanism = replace(FULL, records_per_unit=3, **MODES[mode])
    with_it = clipped_sum(network, network.loss, batch, mechanism, GROUPS)
    keep_B = GROUPS != 3
    fewer = {name: tensor[keep_B] for name, tensor in batch.items()}
    without = clipped_sum(network, network.loss, fewer, mechanism, GROUPS[keep_B])
    for name, total in with_it.items():
        assert total.isfinite().all()
        torch.testing.assert_close(total, without[name], rtol=1e-5, atol=1e-6)


def test_a_group_is_capped_never_split_and_sampled_as_a_whole():
    index = UnitIndex(6, GROUPS, records_per_unit=2)
    assert index.count == 3
    parts = index.parts(torch.arange(3), most=3)
    assert [(part.tolist(), unit.tolist()) for part, unit in parts] == [([2, 3], [0, 0]), ([0, 1, 5], [0, 0, 1])]
    assert [part.tolist() for part, _ in index.parts(torch.tensor([0]), most=1)] == [[2, 3]]  # larger than the part
    assert index.parts(torch.arange(0), most=3) == []
    with pytest.raises(BadInputError, match="records_per_unit"):
        UnitIndex(6, GROUPS)
    with pytest.raises(BadInputError, match="one 64-bit integer per record"):
        UnitIndex(6, GROUPS[:4], records_per_unit=2)


@pytest.mark.parametrize("unit", UNITS)
def test_physical_batches_change_nothing(unit):
    network, batch = build(make_config(), seed=3), make_batch(6)
    mechanism = replace(FULL, records_per_unit=3 if unit == "group" else None)
    sums = {}
    for size in (512, 4, 1):
        cut = replace(mechanism, physical_batch=size)
        index = UnitIndex(6, UNITS[unit], mechanism.records_per_unit)
        with PrivateTraining(network, torch.optim.SGD(network.parameters()), network.loss, cut, SECRET) as training:
            training.accumulate(batch, index, torch.arange(index.count))
            sums[size] = [total.double() for total in training._optimizer._sums]
    # A group that is larger than the batch is in parts, and clipped by its norm itself instead of an upper bound of it.
    allowed = {4: 1e-6, 1: 1e-6 if unit == "record" else 1e-5}
    for size, most in allowed.items():
        for total, whole in zip(sums[size], sums[512], strict=True):
            assert float((total - whole).norm()) <= most * float(whole.norm())


def test_the_physical_batch_follows_the_memory():
    network, batch = build(make_config(), seed=3), make_batch(200)
    sizes = {}
    for memory in (1, 1 << 20, 1 << 34):
        with PrivateTraining(
            network, torch.optim.SGD(network.parameters()), network.loss, replace(FULL, memory_bytes=memory), SECRET
        ) as training:
            training.step(batch)
            sizes[memory] = training._room.examples
    assert sizes[1] == 1
    assert 1 < sizes[1 << 20] < 512
    assert sizes[1 << 34] == 512


def test_the_physical_batch_does_not_depend_on_how_many_records_there_are():
    """What autograd keeps of one example may be a view of the whole data set, whose memory is no example's."""
    module = nn.Linear(6, 1)
    sizes = []
    for records in (300, 30_000):
        batch = {"x": torch.randn(records, 6)}
        with PrivateTraining(
            module,
            torch.optim.SGD(module.parameters()),
            lambda batch: module(batch["x"]).square().squeeze(1),
            replace(FULL, memory_bytes=1 << 16),
            SECRET,
        ) as training:
            training.accumulate(batch, UnitIndex(records), torch.arange(200))
            sizes.append(training._room.examples)
    assert sizes[0] == sizes[1] > 100


class TwoTasks(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 1), nn.Linear(5, 1)

    def loss(self, batch):
        h = torch.tanh(self.trunk(batch["x"]))
        return torch.stack([self.a(h).square().squeeze(1), 30.0 * self.b(h).abs().squeeze(1)], dim=1)


def test_each_task_is_clipped_before_the_joint_clip():
    torch.manual_seed(1)
    module, batch = TwoTasks(), {"x": torch.randn(6, 6)}
    expected = {name: 0.0 for name, _ in module.named_parameters()}
    for unit in range(6):
        task_gradients = []
        for task in range(2):
            loss = module.loss({"x": batch["x"][unit : unit + 1]})[0, task]
            gradient = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
            pairs = zip(module.parameters(), gradient, strict=True)
            gradient = [torch.zeros_like(p) if g is None else g for p, g in pairs]
            norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradient))
            factor = min(1.0, FULL.clip / math.sqrt(2) * SHRINK / norm)
            task_gradients.append([g.double() * factor for g in gradient])
        joint = [a + b for a, b in zip(*task_gradients, strict=True)]
        norm = math.sqrt(sum(float(g.square().sum()) for g in joint))
        for name, g in zip(expected, joint, strict=True):
            expected[name] = expected[name] + g * min(1.0, FULL.clip * SHRINK / norm)
    actual = clipped_sum(module, module.loss, batch, FULL)
    for name, total in actual.items():
        assert relative_error(total, expected[name]) < 1e-4
    with pytest.raises(BadInputError, match="several tasks need gradients 'bookkeeping'"):
        clipped_sum(module, module.loss, batch, replace(FULL, gradients="hooks"))


def test_an_adaptive_bound_follows_its_quantile_and_costs_what_is_charged():
    rule, divisor, charged = AdaptiveClip(quantile=0.5, rate=0.2, lowest=0.01), 200.0, 1.1
    # Gradient at z with sensitivity 1, count at s with sensitivity ½: one event of the charged multiplier.
    count = rule.count_noise(charged, divisor)
    gradient = rule.gradient_noise_multiplier(charged, divisor)
    assert (gradient**-2 + (0.5 / count) ** 2) ** -0.5 == pytest.approx(charged, rel=1e-12)
    assert charged < gradient <= charged * 1.16
    assert rule.next(1.0, +divisor / 2, divisor) < 1.0 < rule.next(1.0, -divisor / 2, divisor)
    assert rule.next(1.0, 0.0, divisor) == pytest.approx(1.0)
    assert rule.next(1e-9, divisor / 2, divisor) == 0.01
    network, batch = build(make_config(), seed=3), make_batch(200)
    mechanism = replace(FULL, clipping="adaptive", clip=10.0, declared_size=200, noise_multiplier=0.5)
    with PrivateTraining(
        network, torch.optim.SGD(network.parameters(), lr=1e-6), network.loss, mechanism, SECRET
    ) as training:
        for _ in range(60):
            training.step(batch)
    norms = [g.flatten(1) for g in alone(network, network.loss, batch, torch.arange(200)).values()]
    median = float(torch.cat(norms, dim=1).norm(dim=1).median())
    assert training.clip == pytest.approx(median, rel=0.15)


def test_the_count_of_an_adaptive_bound_is_noised_and_leaves_less_for_the_gradient():
    network, batch = build(make_config(), seed=3), make_batch(20)
    mechanism = replace(FULL, clipping="adaptive", noise_multiplier=2.0, declared_size=20)
    assert mechanism.gradient_noise_multiplier == pytest.approx(2.0 / math.sqrt(0.75))  # the count's share is ¼
    moves = []
    for number in range(40):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
        with PrivateTraining(network, optimizer, network.loss, mechanism, derive(SECRET, number)) as training:
            assert training._optimizer.noise_multiplier == mechanism.gradient_noise_multiplier
            training.step(batch)
            moves.append(math.log(training.clip / mechanism.clip) / -mechanism.adaptive.rate)
    # Share within the bound plus N(0, (2/20)²) − ½; sample deviation of 40 values within 5 of its standard errors.
    spread = float(torch.tensor(moves, dtype=torch.float64).std())
    assert abs(spread / 0.1 - 1) < 5 / math.sqrt(2 * 39)


def test_at_level_strict_the_count_of_an_adaptive_bound_is_noised_on_a_grid(monkeypatch):
    """As the sums are: the last bits of a float's noise could tell what it was added to."""
    network, batch, counts = build(make_config(), seed=3), make_batch(5), []

    def spy(self, clip, noisy_count, divisor):
        counts.append(noisy_count)
        return clip

    monkeypatch.setattr(AdaptiveClip, "next", spy)
    mechanism = replace(FULL, clipping="adaptive", noise_multiplier=2.0, numeric="strict")
    with PrivateTraining(
        network, torch.optim.SGD(network.parameters(), lr=0.0), network.loss, mechanism, SECRET
    ) as training:
        for _ in range(3):
            training.step(batch)
    assert len({*counts}) == 3
    assert all(count * 2**20 == round(count * 2**20) for count in counts)


@pytest.mark.parametrize("mode", MODES)
def test_the_smallest_clip_bounds_the_largest_gradient(mode):
    """A factor that is a subnormal float32 would be rounded by up to 2: one unit alone would break the bound."""
    module = nn.Linear(4, 1, bias=False)
    for size in (0.9e18, 1.1e18):  # up to 2^60, about 1.15e18, a gradient is used at all
        batch = {"x": torch.full((1, 4), size / 2)}
        mechanism = replace(FULL, clip=SMALLEST_CLIP, **MODES[mode])
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        with PrivateTraining(module, optimizer, lambda b: module(b["x"]).squeeze(1), mechanism, SECRET) as training:
            (total,) = training.sums_without_noise(batch, UnitIndex(1), torch.arange(1))
        assert 0.99 * SMALLEST_CLIP < float(total.norm()) <= SMALLEST_CLIP


def test_sums_of_physical_batches_do_not_lose_small_units():
    module = nn.Linear(1, 1, bias=False)
    optimizer = UnitDPOptimizer(torch.optim.SGD(module.parameters(), lr=1.0), FULL)
    for value in (2.0**24, 1.0, 1.0):  # float32 has no 2^24 + 1
        optimizer.accumulate([module.weight], [torch.full((1, 1), value)])
    assert float(optimizer.take_sums()[0]) == 2.0**24 + 2.0


def test_without_privacy_a_groups_loss_is_the_mean_of_its_records_too():
    network, batch = build(make_config(), seed=3), make_batch(6)
    open_ = replace(FULL, noise_multiplier=None, records_per_unit=3)
    actual = clipped_sum(network, network.loss, batch, open_, GROUPS)
    truth = alone(network, network.loss, batch, torch.tensor([1, 1, 0, 0, 0, 2]))
    for name, p in network.named_parameters():
        assert relative_error(actual[name], truth[p].sum(0)) < 1e-5


def test_dropout_draws_belong_to_their_unit():
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(6, 32), UnitDropout(0.5), nn.Linear(32, 3))

    def loss(batch):
        return module(batch["x"]).square().mean(1)

    batch = {"x": torch.randn(6, 6)}
    everyone = clipped_sum(module, loss, batch, replace(FULL, clip=1e6))
    fewer = clipped_sum(module, loss, {"x": batch["x"][:5]}, replace(FULL, clip=1e6))
    again = clipped_sum(module, loss, batch, replace(FULL, clip=1e6, physical_batch=2))
    last = {name: everyone[name] - fewer[name] for name in everyone}
    only_last = torch.arange(6) == 5
    alone_last = clipped_sum(module, lambda b: loss(b) * only_last, batch, replace(FULL, clip=1e6))
    for name in everyone:
        torch.testing.assert_close(last[name], alone_last[name], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(everyone[name], again[name], rtol=1e-4, atol=1e-4)
    assert not torch.equal(module.train()(batch["x"]), module(batch["x"]))  # outside of training, torch's own draws
    module.eval()
    assert torch.equal(module(batch["x"]), module(batch["x"]))
