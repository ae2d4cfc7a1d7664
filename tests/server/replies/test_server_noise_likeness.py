"""Honest replies pass the noise test, every kind of lie fails it, and what fails leaves no trace."""

from __future__ import annotations

import math

import pytest
import torch
from family_samples import FAMILY
from scipy.stats import kstest
from server_samples import SmallFederation, ask, delta_for, held_of, make_plan, train_reply

from conclave.clients.trainer import train
from conclave.model import parameters
from conclave.model.building import build
from conclave.protocol.encodings import encodings_of, wire_form
from conclave.server.replies.config import NoiseTestConfig
from conclave.server.replies.noise_likeness import NoiseTest, distance_from_normal
from conclave.server.replies.public_noise import PublicNoise

HELD = {0: (0, 2, 5)}
SIZE = 100
PRIVACY = {"epsilon": 8.0, "delta": 1e-5, "clip": 1.5, "sampling_rate": 0.5}


def noisy_plan(**changes):
    """Noise is most of a delta, as in a real run: a signal of at most about 2, in units of the noise."""
    return make_plan(**({"privacy": PRIVACY, "training": {"learning_rate": 0.5}, "noise_multiplier": 50.0} | changes))


def noise_delta(plan, seed, held=HELD, size=SIZE):
    """What an honest node without any signal sends."""
    generator = torch.Generator().manual_seed(seed)
    std = PublicNoise.of(plan, size, 1.0, 1e-9).std
    return {n: std * torch.randn(s, generator=generator) for n, s in plan.travelling(held).items()}


def flaw(test, delta, node="a", held=HELD, size=SIZE):
    return test.flaw(node, test.standardise(held, delta, size))


def remember(test, delta, node="a", held=HELD, size=SIZE):
    test.remember(node, test.standardise(held, delta, size))


def scaled(delta, factor):
    return {name: factor * tensor for name, tensor in delta.items()}


def as_long_as(delta, other):
    def norm(d):
        return math.sqrt(sum(float(t.double().square().sum()) for t in d.values()))

    return scaled(delta, norm(other) / norm(delta))


@pytest.mark.parametrize("count", [1, 2, 77, 5000])
def test_the_distance_from_normal_is_scipys(count):
    z = torch.randn(count, generator=torch.Generator().manual_seed(count)) * 1.1 + 0.05
    assert distance_from_normal(z) == pytest.approx(kstest(z.double().numpy(), "norm").statistic, abs=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"noise_multiplier": 0.7},  # signal can be most of it
        {"training": {"learning_rate": 0.5, "steps": 4}},
        {"training": {"learning_rate": 0.5, "steps": 3, "optimizer": {"kind": "sgd", "momentum": 0.9}}},
        {"training": {"learning_rate": 0.5, "expert_learning_rate": "held"}},
        {"privacy": PRIVACY | {"clipping": "per-layer"}},
        {"privacy": PRIVACY | {"clipping": "automatic"}},
        {"privacy": PRIVACY | {"numeric": "strict"}},
        {"load_share": 0.2},
        {"traffic": {"delta": "bf16"}},
        {"traffic": {"delta": "int8"}},
    ],
)
def test_what_honest_training_sends_passes_round_after_round(changes):
    """Ten rounds each, all from the same weights, so that signals add up. False alarms 1e-5 a case in all."""
    plan = noisy_plan(**changes)
    test = NoiseTest(plan, NoiseTestConfig())
    network = build(plan.model, seed=1)
    wire = parameters.split(network.state_dict(), network.held)
    sent = {name: wire[name].clone() for name in parameters.select(wire, HELD)}
    form = wire_form(plan.travelling(HELD), encodings_of(plan.traffic.delta, plan.travelling(HELD)))
    for number in range(10):
        secret = number.to_bytes(32, "big")
        delta = train(plan, HELD, sent, network.synthetic_batch(SIZE), SIZE, secret).delta
        delta = form.decode(form.encode(delta, secret))
        assert flaw(test, delta) is None
        remember(test, delta)


@pytest.mark.parametrize("name", sorted(FAMILY))
def test_every_family_noises_what_the_test_looks_at(name):
    """A tensor that is not trained, or noised otherwise, would show. False alarms 1e-6 a family."""
    plan = noisy_plan(model=FAMILY[name])
    network = build(plan.model, seed=1)
    held = plan.model.all_experts
    wire = {n: t.clone() for n, t in parameters.split(network.state_dict(), held).items()}
    delta = train(plan, held, wire, network.synthetic_batch(20), SIZE, bytes(32)).delta
    test = NoiseTest(plan, NoiseTestConfig())
    standardised = test.standardise(held, delta, SIZE)
    assert test.flaw("a", standardised) is None
    for tensor_name, z in standardised.values.items():
        assert float(z.double().square().sum()) > 1e-3 * z.numel(), tensor_name


SPIKED = "shared/head.score.weight"


def spiked(tensor):
    """A value that no distance of distributions sees, and the norm does."""
    flat = tensor.flatten().clone()
    flat[0] = 40.0 * tensor.std()
    return flat.view_as(tensor)


LIES = {
    "zeros": (lambda d: scaled(d, 0.0), "norm"),
    "half the noise": (lambda d: scaled(d, 0.5), "norm"),
    "twice the noise": (lambda d: scaled(d, 2.0), "norm"),
    "sign flipped, near the norm bound": (lambda d: scaled(d, -2.9), "norm"),
    "constant": (lambda d: as_long_as({n: torch.ones_like(t) for n, t in d.items()}, d), "normal"),
    "one sign": (lambda d: {n: t.abs() for n, t in d.items()}, "normal"),
    "two values": (lambda d: as_long_as({n: t.sign() for n, t in d.items()}, d), "normal"),
    "one large value": (lambda d: d | {SPIKED: spiked(d[SPIKED])}, "norm"),
    "all in one tensor": (
        lambda d: as_long_as({n: t * (n == SPIKED) for n, t in d.items()}, d),
        "norm",
    ),
    "experts without noise": (lambda d: {n: t * (not n.startswith("expert/")) for n, t in d.items()}, "norm"),
}


@pytest.mark.parametrize("kind", sorted(LIES))
def test_a_lie_fails(kind):
    """Their noise is drawn, with a fixed seed: without the lie it passes, which fails by chance 1e-6."""
    plan = noisy_plan()
    test, honest = NoiseTest(plan, NoiseTestConfig()), noise_delta(plan, 1)
    assert flaw(test, honest) is None
    lie, word = LIES[kind]
    found = flaw(test, lie(honest))
    assert found is not None
    assert word in found


def test_a_lie_that_is_repeated_fails_and_one_that_is_turned_round_does_too():
    plan = noisy_plan()
    test, lie = NoiseTest(plan, NoiseTestConfig()), noise_delta(plan, 1)
    remember(test, lie)
    assert "along" in flaw(test, lie)
    assert "along" in flaw(test, scaled(lie, -1.0))
    assert flaw(test, lie, node="b") is None  # each node has a past of its own
    assert flaw(test, noise_delta(plan, 2)) is None


def test_nothing_is_remembered_where_rounds_are_tested_one_by_one():
    plan = noisy_plan()
    test, lie = NoiseTest(plan, NoiseTestConfig(across_rounds=False)), noise_delta(plan, 1)
    remember(test, lie)
    assert flaw(test, lie) is None
    assert test.history == {}


def test_a_direction_that_is_hidden_in_noise_shows_after_some_rounds():
    """A third of each delta's length: too little to show in one, enough against the sum of those before."""
    plan = noisy_plan()
    test, direction = NoiseTest(plan, NoiseTestConfig()), noise_delta(plan, 99)
    for number in range(1, 40):
        noise = noise_delta(plan, number)
        lie = as_long_as({n: t + direction[n] / 2.8 for n, t in noise.items()}, noise)
        found = flaw(test, lie)
        if found is not None:
            break
        remember(test, lie)
    assert 2 < number < 39
    assert "along" in found


def test_a_repetition_shows_with_other_experts_beside_it():
    plan = noisy_plan()
    test, first, later = NoiseTest(plan, NoiseTestConfig()), {0: (0, 1, 2)}, {0: (2, 4, 5)}
    before, fresh = noise_delta(plan, 1, first), noise_delta(plan, 2, later)
    remember(test, before, held=first)
    assert flaw(test, fresh, held=later) is None
    assert "along" in flaw(test, fresh | {n: t for n, t in before.items() if n in fresh}, held=later)


def test_a_selection_bias_is_not_looked_at():
    plan = noisy_plan(model=biased())
    test, delta = NoiseTest(plan, NoiseTestConfig()), noise_delta(plan, 1)
    names = [n for n in delta if n.endswith("/selection_bias")]
    assert names
    for value in (0.0, 1e3):  # an honest one, and one that the server does not take
        assert flaw(test, delta | {n: torch.full_like(delta[n], value) for n in names}) is None


def biased():
    document = make_plan().model.model_dump(exclude_none=True)
    document["experts"]["router"] = {"kind": "sigmoid"}
    return document


def answers(federation, lie=None):
    """Send noise from all nodes, and ``lie`` of it from the last, where one is given."""
    requests = ask(federation)
    replies = []
    for number, request in enumerate(requests):
        size = 100 * (request.metadata.dst_node_id - 10)
        delta = noise_delta(federation.plan, number, held_of(request), size)
        replies.append(train_reply(request, lie(delta) if lie and number == len(requests) - 1 else delta))
    return replies


def after(federation, replies):
    outcome = federation.answer(1, replies)
    return outcome.replies, federation.values()


@pytest.mark.parametrize("kind", sorted(LIES))
def test_a_lie_is_dropped_counted_and_leaves_no_trace(kind):
    """And without the test it is taken, so it is the test that drops it."""
    lie = LIES[kind][0]
    with_test = SmallFederation(plan=noisy_plan(), noise_test={})
    replies, lied = after(with_test, answers(with_test, lie))
    assert (replies.dropped_by, replies.accepted) == ({"not-noise-like": 1}, 3)
    silent = SmallFederation(plan=noisy_plan(), noise_test={})
    _, unanswered = after(silent, answers(silent)[:-1])
    assert all(torch.equal(tensor, lied[name]) for name, tensor in unanswered.items())
    without = SmallFederation(plan=noisy_plan())
    replies, taken = after(without, answers(without, lie))
    assert replies.accepted == 4
    assert not all(torch.equal(tensor, lied[name]) for name, tensor in taken.items())


def test_what_was_dropped_is_not_remembered_and_what_was_taken_is():
    federation = SmallFederation(plan=noisy_plan(), noise_test={})
    replies = answers(federation, LIES["constant"][0])
    after(federation, replies)
    assert len(federation.model.noise_test.history) == 3


def test_a_constant_delta_of_the_shape_asked_for_is_no_noise():
    federation = SmallFederation(plan=noisy_plan(), noise_test={})
    replies = [train_reply(request, delta_for(request, federation)) for request in ask(federation)]
    outcome = federation.answer(1, replies)
    assert not outcome.changed
    assert outcome.replies.dropped_by == {"not-noise-like": 4}
