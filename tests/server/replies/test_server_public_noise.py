"""What is public about a delta's noise: against training, scipy's distributions, and signals that do their worst."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, chi2, kstest, ncx2, norm
from server_samples import make_plan

from conclave.clients.trainer import train
from conclave.model import parameters
from conclave.model.building import build
from conclave.server.replies.public_noise import PublicNoise, expert_factor, most_units

HELD = {0: (0, 2, 5)}  # of six


def plan_of(steps=1, sigma=2000.0, **training):
    return make_plan(
        training={"learning_rate": 0.5, "steps": steps} | training,
        privacy={"epsilon": 8.0, "delta": 1e-5, "clip": 1.5, "sampling_rate": 0.5},
        noise_multiplier=sigma,
    )


def trained(plan, size=40, seed=1, *, alike=False):
    network = build(plan.model, seed=1)
    wire = parameters.split(network.state_dict(), network.held)
    sent = {name: wire[name].clone() for name in parameters.select(wire, HELD)}
    records = network.synthetic_batch(size)
    if alike:
        records = {name: tensor[:1].expand_as(tensor).contiguous() for name, tensor in records.items()}
    return train(plan, HELD, sent, records, size, seed.to_bytes(32, "big")).delta


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"steps": 3},
        {"steps": 5, "optimizer": {"kind": "sgd", "momentum": 0.9}},
        {"steps": 2, "expert_learning_rate": "held"},
    ],
)
def test_a_delta_in_units_of_its_noise_is_normal(training):
    """With σ so large that signal is nothing; false alarms 1e-6 for each of the groups."""
    plan = plan_of(**training)
    noise = PublicNoise.of(plan, 40, 1.0, 1e-9)
    delta = trained(plan)
    for group in ("shared", "router", "expert"):
        factor = expert_factor(plan, HELD, 0) if group == "expert" else 1.0
        z = torch.cat([t.flatten() for n, t in delta.items() if n.startswith(group)]) / (noise.std * factor)
        assert kstest(z.double().numpy(), "norm").pvalue > 1e-6, group
        assert 5e-7 < chi2.cdf(float(z.double().square().sum()), len(z)) < 1 - 5e-7, group


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_the_signal_is_never_longer(steps, momentum):
    """Almost without noise, all units alike and clipped: the delta is as long a signal as there is."""
    plan = plan_of(steps, 1e-6, optimizer={"kind": "sgd", "momentum": momentum}).model_copy(
        update={"privacy": plan_of().privacy.model_copy(update={"clip": 1e-3})}  # below every gradient's norm
    )
    noise = PublicNoise.of(plan, 40, 1.0, 1e-9)
    length = math.sqrt(sum(float(t.double().square().sum()) for t in trained(plan, alike=True).values()))
    assert 0.3 * noise.signal * noise.std < length < noise.signal * noise.std


def test_the_largest_batch_is_beyond_the_binomial_quantile_and_not_far():
    for units, rate, risk in (
        (100, 0.7, 1e-7),
        (7200, 0.01, 1e-7),
        (10_000, 0.15, 1e-4),
        (12, 0.5, 1e-7),
        (50, 1.0, 1e-3),
    ):
        exact = binom.isf(risk, units, rate)
        assert exact <= most_units(units, rate, risk) <= exact + 0.3 * (exact - rate * units) + 6


@pytest.mark.parametrize("risk", [1e-7, 1e-3])
@pytest.mark.parametrize("count", [3, 60, 70, 256, 20_000])
@pytest.mark.parametrize("signal", [0.0, 4.0, 40.0])
def test_the_range_of_norms_of_one_step_has_scipys_tails(count, signal, risk):
    low, high = PublicNoise(std=1.0, signal=signal, last=1.0, single=True).norm_range(count, risk)
    tail = ncx2.sf(high**2, count, signal**2) if signal else chi2.sf(high**2, count)
    assert tail <= risk
    for length in np.linspace(0.0, signal, 5):  # any signal up to the longest
        assert (ncx2.cdf(low**2, count, length**2) if length else chi2.cdf(low**2, count)) <= risk
    exact = math.sqrt(ncx2.isf(risk, count, signal**2) if signal else chi2.isf(risk, count))
    assert high < 1.1 * exact + 1.0  # and is of use


def test_the_range_of_norms_of_several_steps_holds_against_any_signal():
    noise = PublicNoise(std=1.0, signal=5.0, last=0.5, single=False)
    low, high = noise.norm_range(900, 1e-7)
    assert low <= math.sqrt(chi2.ppf(1e-7, 900)) - 5.0
    assert high >= math.sqrt(chi2.isf(1e-7, 900)) + 5.0


def worst_signal(first, length, single):
    """Everyone the same way; where the first step's noise is known, those near the middle, to where most are."""
    if single:
        return np.full(len(first), length / math.sqrt(len(first)))
    near = np.argsort(np.abs(first + 0.3))[: len(first) // 2]
    signal = np.zeros(len(first))
    signal[near] = length / math.sqrt(len(near))
    return signal


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize(("count", "length"), [(400, 0.0), (400, 8.0), (1500, 8.0), (1500, 40.0)])
def test_no_signal_moves_a_distribution_further(single, count, length):
    """400 draws at a risk of 1 %: more than 15 fail by chance with probability 1e-5, if the bound were exact."""
    last = 1.0 if single else math.sqrt(0.5)
    limit = PublicNoise(std=1.0, signal=length, last=last, single=single).distance(count, 0.01)
    generator, failed = np.random.default_rng(5), 0
    for _ in range(400):
        first = generator.standard_normal(count) * math.sqrt(1.0 - last**2)
        z = first + worst_signal(first, length, single) + last * generator.standard_normal(count)
        failed += kstest(z, "norm").statistic > limit
    assert failed <= 15


def test_what_lies_along_a_fixed_direction_is_signal_and_a_normal_tail():
    noise = PublicNoise(std=1.0, signal=3.0, last=1.0, single=True)
    assert norm.sf(noise.along(1e-7) - 3.0) <= 1e-7
    assert noise.along(1e-7) <= 3.0 + 1.1 * norm.isf(1e-7)


def test_where_noise_is_not_public_it_is_refused():
    for plan in (
        plan_of(optimizer={"kind": "adam"}),
        make_plan(
            noise_multiplier=None,
            privacy={"mechanism": "none", "epsilon": 8.0, "delta": 1e-5, "clip": 1.0, "sampling_rate": 0.5},
        ),
    ):
        with pytest.raises(ValueError, match="SGD with privacy"):
            PublicNoise.of(plan, 40, 1.0, 1e-9)
