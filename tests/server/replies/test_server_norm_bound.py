"""The norm bound against its formula and against honest training."""

from __future__ import annotations

import math

import pytest
from server_samples import make_plan

from conclave.clients.trainer import train
from conclave.model import parameters
from conclave.model.building import build
from conclave.server.replies.validation import norm_bound


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
