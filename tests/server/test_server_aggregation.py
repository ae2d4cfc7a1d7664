"""Averages against hand-computed values, the norm bound against its formula, the optimizer against recursions."""

from __future__ import annotations

import itertools
import math
import weakref

import pytest
import torch
from server_samples import average, make_plan

from clients.trainer import train
from model import build, parameters
from server.aggregation import Averager, Contribution, ServerOptimizer, norm_bound
from server.config import ServerOptimizerConfig

A, B, C = "shared/a", "expert/0/1/up.weight", "router/0/1/score.weight"


def give(node, weight, **delta):
    names = {"a": A, "b": B, "c": C}
    return Contribution(node, weight, {names[key]: torch.tensor(value) for key, value in delta.items()})


def test_weighted_means_by_hand():
    replies = [
        give("n1", 100.0, a=[1.0, 0.0], b=[4.0], c=[1.0]),
        give("n2", 300.0, a=[5.0, -4.0], b=[8.0]),
        give("n3", 600.0, a=[-1.0, 2.0]),
    ]
    averaged = average(replies, min_holders=1)
    # shared: (100·1 + 300·5 − 600·1)/1000 = 1 and (−1200 + 1200)/1000 = 0
    assert averaged[A].tolist() == [1.0, 0.0]
    assert averaged[B].tolist() == [7.0]  # holders only: (400 + 2400)/400
    assert averaged[C].tolist() == [1.0]
    assert all(tensor.dtype == torch.float32 for tensor in averaged.values())


@pytest.mark.parametrize(("min_holders", "kept"), [(1, {A, B, C}), (2, {A, B}), (3, {A}), (9, {A})])
def test_too_few_holders_leave_an_expert_out_but_never_shared_weights(min_holders, kept):
    replies = [give("n1", 1.0, a=[1.0], b=[1.0], c=[1.0]), give("n2", 1.0, a=[3.0], b=[3.0])]
    averaged = average(replies, min_holders)
    assert set(averaged) == kept
    assert averaged[A].tolist() == [2.0]


def test_the_order_of_replies_does_not_touch_a_bit():
    # Large opposite values: their order decides what becomes of the small ones between them.
    values = [1e15, 1 / 3, -1e15, 7.0, 3e9]
    replies = [Contribution(f"n{n}", 1.0 + n % 2, {A: torch.tensor([v])}) for n, v in enumerate(values)]
    replies = [Contribution(r.node, r.weight, r.delta | ({B: r.delta[A]} if r.node < "n3" else {})) for r in replies]
    first = average(replies, 1)
    for order in itertools.permutations(replies):
        again = average(order, 1)
        assert again.keys() == first.keys()
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_no_reply_no_average():
    assert average([], 1) == {}


def test_replies_are_not_modified():
    delta = {A: torch.ones(2)}
    average([Contribution("n1", 3.0, delta), Contribution("n2", 5.0, delta)], 1)
    assert torch.equal(delta[A], torch.ones(2))


@pytest.mark.parametrize(
    ("noise", "clip", "rate", "lr", "steps", "parameters", "size"),
    [(2.0, 1.5, 0.5, 0.5, 3, 400, 100), (0.7, 10.0, 0.01, 2.0, 1, 1_000_000, 7), (5.0, 1e-3, 1.0, 1e-3, 50, 1, 1)],
)
def test_norm_bound_is_the_documented_formula(noise, clip, rate, lr, steps, parameters, size):
    plan = make_plan(
        noise_multiplier=noise,
        privacy={"epsilon": 8.0, "delta": 1e-5, "clip": clip, "sampling_rate": rate},
        training={"learning_rate": lr, "steps": steps},
    )
    expected = 3 * lr * steps * (clip + noise * clip * math.sqrt(parameters) / (rate * size))
    assert norm_bound(plan, parameters, size, 1) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("training", "privacy"),
    [
        ({"optimizer": {"kind": "sgd", "momentum": 0.9}}, {}),
        ({"optimizer": {"kind": "adam"}}, {}),
        ({"optimizer": {"kind": "adam", "floor": 0.5}}, {}),
        ({}, {"clipping": "adaptive"}),
        ({}, {"clipping": "per-layer"}),
        ({}, {"clipping": "automatic"}),
        ({}, {"numeric": "strict"}),
    ],
)
def test_an_honest_delta_is_within_the_norm_bound(training, privacy):
    """Ten steps of the node's own training, for every optimizer and kind of clipping."""
    changed = make_plan(
        training={"steps": 10, "learning_rate": 0.5} | training,
        privacy={"epsilon": 8.0, "delta": 1e-5, "clip": 1.0, "sampling_rate": 0.5} | privacy,
        noise_multiplier=0.8,
    )
    held = {0: (0, 2, 5)}  # some of six
    network = build(changed.model, seed=1)
    wire = parameters.split(network.state_dict(), network.held)
    sent = {name: wire[name].clone() for name in parameters.select(wire, held)}
    delta = train(changed, held, sent, network.synthetic_batch(40), 40, bytes(32)).delta
    norm = math.sqrt(sum(float(t.double().square().sum()) for t in delta.values()))
    assert 0.01 < norm < norm_bound(changed, sum(t.numel() for t in delta.values()), 40, 1)


def test_without_privacy_there_is_no_norm_bound():
    plan = make_plan(
        noise_multiplier=None,
        privacy={"mechanism": "none", "epsilon": 8.0, "delta": 1e-5, "clip": 1.0, "sampling_rate": 0.5},
    )
    assert norm_bound(plan, 10, 10, 1) == math.inf


def tensors():
    generator = torch.Generator().manual_seed(3)
    return {A: torch.randn(4, generator=generator), B: torch.randn(2, 2, generator=generator)}


def test_learning_rate_one_adds_the_delta_exactly():
    start = tensors()
    optimizer = ServerOptimizer(ServerOptimizerConfig(), start)
    delta = {name: torch.randn(t.shape, generator=torch.Generator().manual_seed(4)) for name, t in start.items()}
    optimizer.step(delta, 1.0)
    assert all(torch.equal(optimizer.snapshot()[name], start[name] + delta[name]) for name in start)
    assert optimizer.momentum() == {}


def deltas(rounds):
    generator = torch.Generator().manual_seed(5)
    return [
        {name: torch.randn(t.shape, generator=generator) for name, t in tensors().items() if not (name == B and r == 1)}
        for r in range(rounds)
    ]


def test_momentum_follows_the_recursion_and_absent_tensors_rest():
    """v ← m·v + Δ, x ← x + lr·v (v starts at Δ); a tensor absent from a round keeps x and v."""
    optimizer = ServerOptimizer(ServerOptimizerConfig(momentum=0.9), tensors())
    x = {name: t.double() for name, t in tensors().items()}
    v = {}
    for lr, delta in zip([1.0, 0.5, 0.25, 2.0], deltas(4), strict=True):
        before = {name: t.clone() for name, t in (optimizer.snapshot() | optimizer.momentum()).items()}
        optimizer.step(delta, lr)
        for name in x:
            if name not in delta:
                assert torch.equal(optimizer.momentum()[name], before[name])
                continue
            v[name] = 0.9 * v[name] + delta[name].double() if name in v else delta[name].double()
            x[name] = x[name] + lr * v[name]
        for name in x:
            torch.testing.assert_close(optimizer.snapshot()[name].double(), x[name], rtol=0, atol=1e-5)
            torch.testing.assert_close(-optimizer.momentum()[name].double(), v[name], rtol=0, atol=1e-5)


def test_absent_tensors_keep_their_bits():
    optimizer = ServerOptimizer(ServerOptimizerConfig(momentum=0.5), tensors())
    optimizer.step(deltas(1)[0], 1.0)
    value, velocity = optimizer.snapshot()[B].clone(), optimizer.momentum()[B].clone()
    optimizer.step({A: torch.ones(4)}, 1.0)
    assert torch.equal(optimizer.snapshot()[B], value)
    assert torch.equal(optimizer.momentum()[B], velocity)


def test_restored_momentum_continues_identically():
    config = ServerOptimizerConfig(momentum=0.9)
    steps = deltas(6)
    whole = ServerOptimizer(config, tensors())
    for delta in steps[:3]:
        whole.step(delta, 0.7)
    second = ServerOptimizer(config, tensors())
    second.restore(whole.snapshot(), {name: t.clone() for name, t in whole.momentum().items()})
    for delta in steps[3:]:
        whole.step(delta, 0.7)
        second.step(delta, 0.7)
    assert whole.momentum().keys() == second.momentum().keys() == {A, B}
    for name in (A, B):
        assert torch.equal(whole.snapshot()[name], second.snapshot()[name])
        assert torch.equal(whole.momentum()[name], second.momentum()[name])


def test_the_optimizer_works_on_its_own_copy():
    start = tensors()
    kept = {name: t.clone() for name, t in start.items()}
    ServerOptimizer(ServerOptimizerConfig(), start).step({A: torch.ones(4)}, 1.0)
    assert all(torch.equal(start[name], kept[name]) for name in start)


@pytest.mark.parametrize(
    ("decay", "rates"), [(0.0, [2.0] * 5), (1.0, [2.0, 1.5, 1.0, 0.5, 0.0]), (0.5, [2.0, 1.75, 1.5, 1.25, 1.0])]
)
def test_the_rate_falls_linearly(decay, rates):
    config = ServerOptimizerConfig(learning_rate=2.0, decay=decay)
    assert [config.rate(r, 5) for r in range(1, 6)] == pytest.approx(rates, abs=1e-12)
    assert config.rate(1, 1) == 2.0


def test_a_contribution_in_turn_is_added_at_once_and_an_early_one_waits():
    """Memory does not grow with the cohort while replies come in order."""
    order = ["n1", "n2", "n3", "n4"]
    averager = Averager(order)
    contribution = give("n2", 1.0, a=[5.0])
    averager.add("n2", contribution)
    watched = weakref.ref(contribution)
    del contribution
    assert watched() is not None
    averager.add("n1", None)  # n1 will not come, so it is n2's turn
    assert watched() is None
    averager.add("n4", give("n4", 1.0, a=[7.0]))
    assert averager.result(1)[A].tolist() == [6.0]  # n3 never came
