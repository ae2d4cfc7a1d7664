"""The server optimizer against recursions in float64; state is kept and restored whole, and rests with its tensor."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from conclave.base.errors import BadInputError
from conclave.server.aggregate.config import ServerAdam, ServerOptimizerConfig, ServerSgd
from conclave.server.aggregate.optimizer import ServerOptimizer

A, B = "shared/a", "expert/0/1/up.weight"


def momentum(optimizer):
    return {name: kept["momentum_buffer"] for name, kept in optimizer.state().items()}


def copied(state):
    return {name: {key: value.clone() for key, value in kept.items()} for name, kept in state.items()}


def tensors():
    generator = torch.Generator().manual_seed(3)
    return {A: torch.randn(4, generator=generator), B: torch.randn(2, 2, generator=generator)}


def test_learning_rate_one_adds_the_delta_exactly():
    start = tensors()
    optimizer = ServerOptimizer(ServerSgd(), start)
    delta = {name: torch.randn(t.shape, generator=torch.Generator().manual_seed(4)) for name, t in start.items()}
    optimizer.step(delta, 1.0)
    assert all(torch.equal(optimizer.snapshot()[name], start[name] + delta[name]) for name in start)
    assert optimizer.state() == {}


def deltas(rounds):
    generator = torch.Generator().manual_seed(5)
    return [
        {name: torch.randn(t.shape, generator=generator) for name, t in tensors().items() if not (name == B and r == 1)}
        for r in range(rounds)
    ]


def test_momentum_follows_the_recursion_and_absent_tensors_rest():
    """v ← m·v + Δ, x ← x + lr·v (v starts at Δ); a tensor absent from a round keeps x and v."""
    optimizer = ServerOptimizer(ServerSgd(momentum=0.9), tensors())
    x = {name: t.double() for name, t in tensors().items()}
    v = {}
    for lr, delta in zip([1.0, 0.5, 0.25, 2.0], deltas(4), strict=True):
        before = {name: t.clone() for name, t in (optimizer.snapshot() | momentum(optimizer)).items()}
        optimizer.step(delta, lr)
        for name in x:
            if name not in delta:
                assert torch.equal(momentum(optimizer)[name], before[name])
                continue
            v[name] = 0.9 * v[name] + delta[name].double() if name in v else delta[name].double()
            x[name] = x[name] + lr * v[name]
        for name in x:
            torch.testing.assert_close(optimizer.snapshot()[name].double(), x[name], rtol=0, atol=1e-5)
            torch.testing.assert_close(-momentum(optimizer)[name].double(), v[name], rtol=0, atol=1e-5)


def test_absent_tensors_keep_their_bits():
    optimizer = ServerOptimizer(ServerSgd(momentum=0.5), tensors())
    optimizer.step(deltas(1)[0], 1.0)
    value, velocity = optimizer.snapshot()[B].clone(), momentum(optimizer)[B].clone()
    optimizer.step({A: torch.ones(4)}, 1.0)
    assert torch.equal(optimizer.snapshot()[B], value)
    assert torch.equal(momentum(optimizer)[B], velocity)


def test_restored_momentum_continues_identically():
    config = ServerSgd(momentum=0.9)
    steps = deltas(6)
    whole = ServerOptimizer(config, tensors())
    for delta in steps[:3]:
        whole.step(delta, 0.7)
    second = ServerOptimizer(config, tensors())
    second.restore(whole.snapshot(), copied(whole.state()))
    for delta in steps[3:]:
        whole.step(delta, 0.7)
        second.step(delta, 0.7)
    assert momentum(whole).keys() == momentum(second).keys() == {A, B}
    for name in (A, B):
        assert torch.equal(whole.snapshot()[name], second.snapshot()[name])
        assert torch.equal(momentum(whole)[name], momentum(second)[name])


def test_the_optimizer_works_on_its_own_copy():
    start = tensors()
    kept = {name: t.clone() for name, t in start.items()}
    ServerOptimizer(ServerSgd(), start).step({A: torch.ones(4)}, 1.0)
    assert all(torch.equal(start[name], kept[name]) for name in start)


@pytest.mark.parametrize(
    ("decay", "rates"), [(0.0, [2.0] * 5), (1.0, [2.0, 1.5, 1.0, 0.5, 0.0]), (0.5, [2.0, 1.75, 1.5, 1.25, 1.0])]
)
def test_the_rate_falls_linearly(decay, rates):
    config = ServerSgd(learning_rate=2.0, decay=decay)
    assert [config.rate(r, 5) for r in range(1, 6)] == pytest.approx(rates, abs=1e-12)
    assert config.rate(1, 1) == 2.0


def config(kind, **options):
    return TypeAdapter(ServerOptimizerConfig).validate_python({"kind": kind} | options)


def adam(x, g, s, lr, b1, b2, eps, decay=0.0):
    """Adam with corrected moments (Kingma & Ba 2014, algorithm 1); AdamW decays x first."""
    s["t"] = s.get("t", 0) + 1
    s["m"] = b1 * s.get("m", 0.0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0.0) + (1 - b2) * g**2
    x = x * (1 - lr * decay)
    return x - lr * (s["m"] / (1 - b1 ** s["t"])) / ((s["v"] / (1 - b2 ** s["t"])).sqrt() + eps)


def adagrad(x, g, s, lr, eps):
    s["v"] = s.get("v", 0.0) + g**2
    return x - lr * g / (s["v"].sqrt() + eps)


def nesterov(x, g, s, lr, m):
    s["v"] = m * s["v"] + g if "v" in s else g
    return x - lr * (g + m * s["v"])


KINDS = [
    ({"kind": "adam"}, lambda x, g, s, lr: adam(x, g, s, lr, 0.9, 0.99, 1e-3)),
    ({"kind": "adam", "beta1": 0.5, "beta2": 0.0, "eps": 0.1}, lambda x, g, s, lr: adam(x, g, s, lr, 0.5, 0.0, 0.1)),
    ({"kind": "adamw", "weight_decay": 0.3}, lambda x, g, s, lr: adam(x, g, s, lr, 0.9, 0.99, 1e-3, 0.3)),
    ({"kind": "adagrad", "eps": 0.01}, lambda x, g, s, lr: adagrad(x, g, s, lr, 0.01)),
    ({"kind": "sgd", "momentum": 0.7, "nesterov": True}, lambda x, g, s, lr: nesterov(x, g, s, lr, 0.7)),
]


@pytest.mark.parametrize(("options", "reference"), KINDS)
def test_every_kind_follows_its_recursion_and_absent_tensors_rest(options, reference):
    """The pseudo-gradient is −Δ. Tensor B is absent from round 2: value, moments and count of steps stay."""
    optimizer = ServerOptimizer(config(**options), tensors())
    x = {name: t.double() for name, t in tensors().items()}
    own = {name: {} for name in x}
    for lr, delta in zip([1.0, 0.5, 0.25, 2.0], deltas(4), strict=True):
        before = copied(optimizer.state()), {name: t.clone() for name, t in optimizer.snapshot().items()}
        optimizer.step(delta, lr)
        for name in x:
            if name in delta:
                x[name] = reference(x[name], -delta[name].double(), own[name], lr)
                continue
            assert torch.equal(optimizer.snapshot()[name], before[1][name])
            assert optimizer.state()[name].keys() == before[0][name].keys()
            assert all(torch.equal(value, before[0][name][key]) for key, value in optimizer.state()[name].items())
        for name in x:
            torch.testing.assert_close(optimizer.snapshot()[name].double(), x[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [options for options, _ in KINDS])
def test_restored_state_continues_bit_for_bit(options):
    whole, second = (ServerOptimizer(config(**options), tensors()) for _ in range(2))
    steps = deltas(6)
    for delta in steps[:3]:
        whole.step(delta, 0.7)
    second.restore(whole.snapshot(), copied(whole.state()))
    for delta in steps[3:]:
        whole.step(delta, 0.7, {B: 0.25})
        second.step(delta, 0.7, {B: 0.25})
    for name in (A, B):
        assert torch.equal(whole.snapshot()[name], second.snapshot()[name])
        assert whole.state()[name].keys() == second.state()[name].keys() != set()
        assert all(torch.equal(value, second.state()[name][key]) for key, value in whole.state()[name].items())


@pytest.mark.parametrize("lost", ["step", "exp_avg", "exp_avg_sq"])
def test_state_of_another_optimizer_or_model_is_refused(lost):
    whole = ServerOptimizer(config("adam"), tensors())
    whole.step(deltas(1)[0], 1.0)
    state = copied(whole.state())
    fresh = ServerOptimizer(config("sgd"), tensors())
    with pytest.raises(BadInputError, match="another optimizer's state than that of 'sgd'"):
        fresh.restore(whole.snapshot(), state)
    del state[A][lost]
    with pytest.raises(BadInputError, match="another optimizer's state"):
        ServerOptimizer(config("adam"), tensors()).restore(whole.snapshot(), state)
    with pytest.raises(BadInputError, match="other tensors"):
        ServerOptimizer(config("adam"), {A: torch.zeros(4)}).restore(whole.snapshot(), {})


def test_a_scale_is_a_factor_on_a_tensors_own_rate():
    """Under Adam a smaller delta would step as far; a smaller rate does not."""
    for options in ({"kind": "sgd", "momentum": 0.5}, {"kind": "adam"}):
        scaled, half, full = (ServerOptimizer(config(**options), tensors()) for _ in range(3))
        for delta in deltas(4):
            scaled.step(delta, 0.5, {B: 0.5})
            full.step(delta, 0.5)
            half.step(delta, 0.25)
        assert torch.equal(scaled.snapshot()[A], full.snapshot()[A])
        assert torch.equal(scaled.snapshot()[B], half.snapshot()[B])
        assert not torch.equal(scaled.snapshot()[B], full.snapshot()[B])


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({"schedule": "constant"}, [2.0] * 6),
        ({"decay": 0.5}, [2.0, 1.8, 1.6, 1.4, 1.2, 1.0]),
        # half a cosine from 2 to 2·(1 − 0.5)
        ({"schedule": "cosine", "decay": 0.5}, [1.5 + 0.5 * math.cos(math.pi * k / 5) for k in range(6)]),
        ({"schedule": "step", "decay": 0.5, "step_rounds": 2}, [2.0, 2.0, 1.0, 1.0, 0.5, 0.5]),
        ({"warmup_rounds": 3}, [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]),
        ({"warmup_rounds": 3, "decay": 1.0}, [0.5, 1.0, 1.5, 2.0, 1.0, 0.0]),
        ({"warmup_rounds": 1, "schedule": "step", "decay": 0.9, "step_rounds": 2}, [1.0, 2.0, 2.0, 0.2, 0.2, 0.02]),
    ],
)
@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw", "adagrad"])
def test_schedules_by_hand(kind, options, rates):
    found = config(kind, learning_rate=2.0, **options)
    assert [found.rate(r, 6) for r in range(1, 7)] == pytest.approx(rates, abs=1e-12)


def test_the_falling_rate_has_the_bits_it_always_had():
    found = ServerSgd(learning_rate=0.3, decay=0.8)
    assert [found.rate(r, 60) for r in range(1, 61)] == [0.3 * (1.0 - 0.8 * (r - 1) / 59) for r in range(1, 61)]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kind": "sgd", "nesterov": True}, "momentum is 0.0, must be above 0 with nesterov"),
        ({"kind": "adam", "schedule": "constant", "decay": 0.5}, "decay is 0.5, must be 0 with schedule 'constant'"),
        ({"kind": "adam", "beta2": 1.0}, "less than 1"),
        ({"kind": "adagrad", "eps": 0.0}, "greater than 0"),
        ({"kind": "adagrad", "momentum": 0.5}, "not permitted"),
    ],
)
def test_what_does_not_fit_is_refused(options, sentence):
    with pytest.raises(ValidationError, match=sentence):
        config(**options)


def test_adaptive_kinds_step_less_by_default_than_fedavg():
    assert ServerAdam(kind="adam").learning_rate == 0.01
    assert ServerSgd().learning_rate == 1.0
