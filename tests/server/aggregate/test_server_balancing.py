"""Balancing on the server: relative loads, hostile ones, and which way a selection bias moves."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from conftest import make_config
from server_samples import SmallFederation, ask, delta_for, held_of, make_plan, train_reply

from conclave.clients.trainer import train
from conclave.model import parameters
from conclave.model.building import build
from conclave.server.aggregate.balancing import Balancer, BalancingConfig, load_bound, plausible
from conclave.server.replies.validation import norm_bound
from conclave.server.scenario import parse_scenario

CONFIG = make_config(router={"kind": "sigmoid"})
PLAN = make_plan(model=CONFIG, load_share=0.1)
BALANCING = BalancingConfig(share=0.1, rate=0.25)


def balanced(**options):
    return SmallFederation(plan=PLAN, balancing=BALANCING, **options)


def biases(federation):
    wire = federation.model.tensors
    return [float(wire[f"router/0/{expert}/selection_bias"]) for expert in range(6)]


def reply_of(request, federation, loads, value=0.001):
    return train_reply(request, delta_for(request, federation, value) | {"load/0": torch.tensor(loads)})


def test_a_load_is_relative_to_what_its_holders_had_to_choose_from():
    held = {"a": (0, 1, 2), "b": (1, 2, 3, 4), "c": (2, 3)}
    loads = {"a": [90.0, 120.0, -30.0], "b": [10.0, 20.0, 30.0, 40.0], "c": [7.0, 8.0]}
    size = {"a": 100, "b": 60, "c": 20}
    found = []
    for order in itertools.permutations(held):
        balancer = Balancer(PLAN, BALANCING)
        for node in order:
            balancer.take(node, {0: held[node]}, {"load/0": torch.tensor(loads[node])}, size[node], float(size[node]))
        found.append(balancer.relative_loads())
    assert all(other == found[0] for other in found)  # the same bits
    for expert in range(6):
        holders = [node for node in held if expert in held[node]]
        relative = [loads[n][held[n].index(expert)] / (2 * 0.5 * size[n] * 3 / len(held[n])) * size[n] for n in holders]
        if not holders:
            assert found[0][0][expert] is None
            continue
        assert found[0][0][expert] == pytest.approx(sum(relative) / sum(size[n] for n in holders))


def test_a_bias_moves_against_its_load_by_the_rate_and_only_where_a_load_is_known():
    balancer = Balancer(PLAN, BALANCING)
    wire = {f"router/0/{expert}/selection_bias": torch.tensor([float(expert)]) for expert in range(6)}
    balancer.take("a", {0: (0, 2, 3)}, {"load/0": torch.tensor([200.0, 100.0, 0.0])}, 100, 1.0)
    balancer.move(wire, 1)
    moved = [float(bias) - expert for expert, bias in enumerate(wire.values())]
    assert moved == [-0.25, 0.0, 0.0, 0.25, 0.0, 0.0]


def test_the_step_falls_with_the_rounds():
    config = BalancingConfig(share=0.05, rate=0.1, decay=0.8)
    assert [config.rate_of(r, 5) for r in (1, 3, 5)] == pytest.approx([0.1, 0.06, 0.02])
    assert BalancingConfig(share=0.05, rate=0.1, decay=1.0).rate_of(5, 5) == 0.0


def test_a_round_moves_the_biases_and_tells_the_loads():
    federation = balanced()
    requests = ask(federation)
    replies = [reply_of(r, federation, [300.0 if e == 1 else 100.0 for e in held_of(r)[0]]) for r in requests]
    outcome = federation.answer(1, replies)
    assert outcome.replies.accepted == 4
    holders = {e for r in requests for e in held_of(r)[0]}
    loads = outcome.loads[0]
    mean = sum(load for load in loads if load is not None) / len(holders)
    for expert, bias in enumerate(biases(federation)):
        expected = 0.0 if expert not in holders else math.copysign(0.25, mean - loads[expert])
        assert bias == expected
    assert 1 in holders
    assert biases(federation)[1] == -0.25


def test_replies_may_come_in_any_order():
    states = []
    for flipped in (False, True):
        federation = balanced()
        requests = ask(federation)
        replies = [reply_of(r, federation, [50.0 * e + n for e in held_of(r)[0]]) for n, r in enumerate(requests)]
        outcome = federation.answer(1, reversed(replies) if flipped else replies)
        states.append((outcome.loads, biases(federation)))
    assert states[0] == states[1]


@pytest.mark.parametrize(
    "loads",
    [[math.nan, 1.0, 1.0], [math.inf, 1.0, 1.0], [1e6, 1.0, 1.0], [1.0, -1e6, 1.0], [1.0, 1.0], [[1.0], [1.0], [1.0]]],
)
def test_a_hostile_load_drops_the_reply_and_moves_nothing(loads):
    federation = balanced()
    first, *others = ask(federation)
    before = {name: tensor.clone() for name, tensor in federation.model.tensors.items()}
    outcome = federation.answer(1, [reply_of(first, federation, loads)])
    assert (outcome.replies.dropped, outcome.replies.accepted) == (1, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in federation.model.tensors.items())
    federation = balanced()
    honest = [reply_of(r, federation, [100.0, 100.0, 100.0]) for r in ask(federation)]
    outcome = federation.answer(1, [reply_of(first, federation, loads), *honest[1:]])
    assert (outcome.replies.dropped, outcome.replies.accepted) == (1, len(others))


@pytest.mark.parametrize("names", [(), ("load/1",), ("load/0", "load/1")])
def test_loads_are_those_that_were_asked_for(names):
    federation = balanced()
    first = ask(federation)[0]
    outcome = federation.answer(
        1, [train_reply(first, delta_for(first, federation) | {name: torch.ones(3) for name in names})]
    )
    assert (outcome.replies.dropped, outcome.replies.accepted) == (1, 0)


def test_loads_that_were_not_asked_for_are_refused():
    federation = SmallFederation()
    first = ask(federation)[0]
    outcome = federation.answer(1, [reply_of(first, federation, [1.0, 1.0, 1.0])])
    assert (outcome.replies.dropped, outcome.replies.accepted) == (1, 0)
    assert outcome.loads is None


def test_no_node_moves_a_bias_by_its_delta():
    optimizer = {"kind": "sgd", "learning_rate": 1.0, "momentum": 0.9}
    federation = SmallFederation(plan=PLAN, optimizer=optimizer)
    first = ask(federation)[0]
    outcome = federation.answer(1, [reply_of(first, federation, [1.0, 1.0, 1.0], value=0.01)])
    assert outcome.replies.accepted == 1
    assert biases(federation) == [0.0] * 6
    assert not any("selection_bias" in name for name in federation.model.checkpoint(1).optimizer)


@pytest.mark.parametrize("lie", [-1.0, 1.0])
def test_one_liar_moves_a_bias_by_no_more_than_the_rate(lie):
    federation = balanced()
    requests = ask(federation)
    bound = load_bound(PLAN, 100)
    replies = [reply_of(r, federation, [100.0] * 3 if n else [lie * 0.9 * bound] * 3) for n, r in enumerate(requests)]
    federation.answer(1, replies)
    assert all(abs(bias) <= 0.25 for bias in biases(federation))


@pytest.mark.parametrize(("size", "rate", "steps"), [(40, 0.5, 1), (40, 1.0, 4), (5, 0.05, 10)])
def test_honest_loads_are_within_the_bound_the_most_one_sided_included(size, rate, steps):
    """The node's own training, all records to the same two experts. 30 charges; the bound is nine deviations away."""
    plan = make_plan(
        model=CONFIG,
        load_share=0.05,
        training={"learning_rate": 0.1, "steps": steps},
        privacy={"epsilon": 8.0, "delta": 1e-5, "clip": 1.0, "sampling_rate": rate},
    )
    network = build(CONFIG, seed=1)
    network.blocks[0].moe.router.selection_bias[:2] = 100.0
    wire = parameters.split(network.state_dict(), network.held)
    held = {0: (0, 1, 4)}
    sent = {name: wire[name].clone() for name in parameters.select(wire, held)}
    for number in range(30):
        loads = train(plan, held, sent, network.synthetic_batch(size), size, bytes([number]) * 32).loads
        assert plausible(loads, load_bound(plan, size))
    assert not plausible({"load/0": torch.tensor([1.01 * load_bound(plan, size)])}, load_bound(plan, size))


def test_the_norm_bound_allows_for_the_gradients_own_part_of_the_noise():
    whole = norm_bound(make_plan(model=CONFIG, noise_multiplier=2.0 / math.sqrt(0.6)), 400, 100, 1)
    assert norm_bound(make_plan(model=CONFIG, load_share=0.4), 400, 100, 1) == pytest.approx(whole, rel=1e-12)


# --- the scenario -----------------------------------------------------------------------------------------------------

TEXT = """
name = "small"
[model]
width = 16
encoder = { kind = "image-patch", height = 8, width = 8, patch = 4 }
experts = { routed = 6, hidden = 8, top_k = 2, router = { kind = "sigmoid" } }
head = { kind = "classification", classes = 10 }
[data]
source = "digits"
[partition]
scheme = "dirichlet"
nodes = 5
alpha = 0.5
[privacy]
epsilon = 8.0
delta = 1e-5
clip = 1.0
sampling_rate = 0.1
[training]
learning_rate = 0.5
[federation]
rounds = 20
experts_per_node = 3
"""
ON = {"balancing": {"share": 0.05, "rate": 0.01}}


def scenario(**overrides):
    changes = {key.replace("__", "."): copy.deepcopy(value) for key, value in overrides.items()}
    return parse_scenario(TEXT, where="here.toml", overrides=changes)


def test_balancing_divides_the_noise_of_the_same_charge():
    off, on = scenario().plan(), scenario(**ON).plan()
    assert on.noise_multiplier == off.noise_multiplier
    assert on.noise_parts["delta"] == pytest.approx(off.noise_multiplier / math.sqrt(0.95))
    assert off.noise_parts == {"delta": off.noise_multiplier}
    assert on.hash != off.hash


def test_a_scenario_without_balancing_is_spelled_as_before():
    assert "balancing" not in scenario().toml_for_hash()
    resolved = scenario(**ON).to_toml()
    assert parse_scenario(resolved, where="again") == scenario(**ON)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"balancing__share": 0.6}, "balancing.share is 0.6, must be less than or equal to 0.5"),
        ({"balancing__share": 0.0}, "balancing.share is 0.0, must be greater than or equal to 0.0001"),
        ({"balancing__rate": 0.0}, "balancing.rate is 0.0, must be greater than 0"),
        ({"balancing__rat": 0.1}, "unknown key balancing.rat, the nearest known key is balancing.rate"),
        (
            {"privacy__mechanism": "none"},
            "privacy.mechanism is none, must be gaussian with [balancing]: loads are released noised",
        ),
        (
            {"model__experts__router": {"kind": "softmax"}},
            "model.experts.router.kind is softmax without a selection bias, must have one for [balancing] to move: "
            "sigmoid, hierarchical of style group-limited, or softmax or attention with selection_bias = true",
        ),
        ({"model__experts__router": {"kind": "policy"}}, "model.experts.router.kind is policy without"),
        ({"model__experts__router": {"kind": "top-p"}}, "model.experts.router.kind is top-p without"),
        (
            {"model__experts__router": {"kind": "hierarchical", "groups": 3, "top_groups": 2}},
            "model.experts.router.kind is hierarchical without",
        ),
        (
            {"model__preset": "own", "model__source": "a:b"},
            "model.preset is own, must be another with [balancing]: a model of one's own does not say how it routes",
        ),
    ],
)
def test_what_cannot_be_balanced_is_refused_in_one_sentence(changes, sentence):
    with pytest.raises(ValueError, match=r"here\.toml") as caught:
        scenario(**(ON | changes))
    assert str(caught.value).removeprefix("here.toml: ").startswith(sentence)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "router",
    [
        {"kind": "softmax", "selection_bias": True},
        {"kind": "attention", "key_width": 4, "selection_bias": True},
        {"kind": "hierarchical", "style": "group-limited", "groups": 3, "top_groups": 2},
    ],
)
def test_a_router_with_a_bias_can_be_balanced(router):
    resolved = scenario(**(ON | {"model__experts__router": router}))
    wire = parameters.shapes(resolved.model, resolved.model.all_experts)
    assert sum(name.endswith("/selection_bias") for name in wire) == 6
