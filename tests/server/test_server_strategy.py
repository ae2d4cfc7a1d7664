"""A round with hand-made replies: who is asked what, and what becomes of the answers."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import make_config
from flwr.app import Message
from server_samples import (
    ask,
    be_the_server,
    delta_for,
    describe,
    held_of,
    make_plan,
    make_strategy,
    received,
    reply_with,
    train_reply,
)

import conclave.protocol.encodings
from conclave.model import parameters
from conclave.protocol.codec import decode, encode, tensors_of, unpack
from conclave.protocol.encodings import TrafficConfig, encodings_of, wire_form
from conclave.protocol.messages import CODES, TRAIN, Refusal, TrainRequest
from conclave.protocol.tensor_array import pack

NO_PRIVACY = make_plan(
    noise_multiplier=None,
    privacy={"mechanism": "none", "epsilon": 8.0, "delta": 1e-5, "clip": 1.0, "sampling_rate": 0.5},
)


def values(strategy):
    return {name: t.clone() for name, t in strategy.optimizer.snapshot().items()}


@pytest.mark.parametrize("code", [code for code in CODES if code != "bad-request"])
def test_a_refusal_is_counted_by_its_code(code):
    strategy = make_strategy(nodes=3)
    first, second, good = ask(strategy)
    refusals = [reply_with(r, encode(Refusal(code=code))) for r in (first, second)]
    strategy.aggregate_train(1, [*refusals, train_reply(good, delta_for(good, strategy))])
    tally = strategy.tally
    assert tally.refused == {code: 2}
    assert (tally.accepted, tally.dropped, tally.missing) == (1, 0, 0)


def test_silent_nodes_are_missing():
    strategy = make_strategy(nodes=4)
    requests = ask(strategy)
    strategy.aggregate_train(1, [train_reply(requests[0], delta_for(requests[0], strategy))])
    assert (strategy.tally.accepted, strategy.tally.missing) == (1, 3)
    ask(strategy, 2)
    before = values(strategy)
    assert strategy.aggregate_train(2, []) == (None, None)
    assert (strategy.tally.accepted, strategy.tally.dropped, strategy.tally.missing) == (0, 0, 4)
    assert all(torch.equal(t, before[n]) for n, t in values(strategy).items())


def test_the_second_reply_of_a_node_is_dropped():
    strategy = make_strategy(nodes=2)
    before = values(strategy)
    one, two = ask(strategy)
    replies = [train_reply(one, delta_for(one, strategy, 0.001)), train_reply(one, delta_for(one, strategy, 0.002))]
    strategy.aggregate_train(1, [*replies, train_reply(two, delta_for(two, strategy, 0.001))])
    assert (strategy.tally.accepted, strategy.tally.dropped_by) == (2, {"duplicate": 1})
    name = "shared/head.score.weight"
    torch.testing.assert_close(values(strategy)[name], before[name] + 0.001, rtol=0, atol=1e-7)


def test_a_reply_from_a_node_that_was_not_asked_is_dropped():
    strategy = make_strategy(nodes=3, cohort={"kind": "fixed", "size": 1})
    before = values(strategy)
    (request,) = ask(strategy)
    absent = next(11 + n for n in range(3) if 11 + n != request.metadata.dst_node_id)
    for stranger in (absent, 99):
        forged = Message(request.content, dst_node_id=stranger, message_type=TRAIN)
        forged.metadata.__dict__["_message_id"] = "forged"
        strategy.aggregate_train(1, [train_reply(forged, delta_for(request, strategy, 5.0))])
    assert (strategy.tally.accepted, strategy.tally.dropped_by) == (0, {"not-asked": 2})
    assert all(torch.equal(t, before[n]) for n, t in values(strategy).items())
    strategy.aggregate_train(1, [train_reply(request, delta_for(request, strategy))])
    assert strategy.tally.accepted == 1


def test_a_reply_of_the_last_round_is_dropped_unless_asked_again():
    strategy = make_strategy(nodes=6, cohort={"kind": "fixed", "size": 2})
    rounds = [ask(strategy, r) for r in (1, 2)]
    late = [r for r in rounds[0] if r.metadata.dst_node_id not in {q.metadata.dst_node_id for q in rounds[1]}]
    assert late
    strategy.aggregate_train(2, [train_reply(r, delta_for(r, strategy)) for r in late])
    assert (strategy.tally.accepted, strategy.tally.dropped) == (0, len(late))


@pytest.mark.parametrize(("share", "accepted"), [(0.999, 1), (1.001, 0)])
@pytest.mark.parametrize("number", [1, 3])
def test_the_norm_bound_uses_the_nodes_own_size_and_parameters(share, accepted, number):
    strategy = make_strategy(nodes=4)
    request = next(r for r in ask(strategy) if r.metadata.dst_node_id == 10 + number)
    shapes = parameters.shapes(strategy.plan.model, held_of(request))
    count = sum(shape.numel() for shape in shapes.values())
    # 3·lr·steps·(C + σC√d/(q·size)) with the numbers of make_plan and describe
    bound = 3 * 0.5 * 3 * (1.5 + 2.0 * 1.5 * math.sqrt(count) / (0.5 * 100 * number))
    value = share * bound / math.sqrt(count)
    strategy.aggregate_train(1, [train_reply(request, delta_for(request, strategy, value))])
    assert (strategy.tally.accepted, strategy.tally.dropped) == (accepted, 1 - accepted)


def test_without_privacy_there_is_no_norm_bound():
    strategy = make_strategy(nodes=1, plan=NO_PRIVACY)
    (request,) = ask(strategy)
    strategy.aggregate_train(1, [train_reply(request, delta_for(request, strategy, 1e6))])
    assert strategy.tally.accepted == 1


@pytest.mark.parametrize("weights", ["declared", "uniform"])
def test_a_round_applies_the_weighted_mean_over_holders(weights):
    strategy = make_strategy(nodes=4, weights=weights, optimizer={"learning_rate": 0.5, "decay": 0.5})
    before = values(strategy)
    requests = ask(strategy, 3)
    strategy.aggregate_train(
        3, [train_reply(r, delta_for(r, strategy, 0.001 * (r.metadata.dst_node_id - 10) ** 2)) for r in requests]
    )
    rate = 0.5 * (1 - 0.5 * 2 / 9)  # round 3 of 10
    for name, tensor in values(strategy).items():
        layer_expert = name.split("/")[1:3] if not name.startswith("shared/") else None
        holders = [
            r.metadata.dst_node_id - 10
            for r in requests
            if layer_expert is None or int(layer_expert[1]) in held_of(r)[int(layer_expert[0])]
        ]
        weight = {n: (100.0 * n if weights == "declared" else 1.0) for n in holders}
        mean = sum(weight[n] * 0.001 * n**2 for n in holders) / sum(weight.values())
        torch.testing.assert_close(tensor, before[name] + rate * mean, rtol=0, atol=1e-6)


def test_an_expert_with_too_few_holders_keeps_its_value():
    strategy = make_strategy(nodes=3, min_holders=2)
    before = values(strategy)
    requests = ask(strategy)
    strategy.aggregate_train(1, [train_reply(r, delta_for(r, strategy)) for r in requests])
    holders = Counter(e for r in requests for e in held_of(r)[0])
    kept = {n for n, t in values(strategy).items() if torch.equal(t, before[n])}
    single = {e for e in range(6) if holders[e] < 2}
    assert 0 < len(single) < 6
    assert kept == {n for n in before if not n.startswith("shared/") and int(n.split("/")[2]) in single}
    assert strategy.tally.held_back == len(kept)


def test_the_order_of_replies_does_not_touch_a_bit():
    size = {11: 1e15, 12: 1.0, 13: -1e15, 14: 3e9}  # summed in another order, floats give another result
    results = []
    for backwards in (False, True):
        strategy = make_strategy(nodes=4, plan=NO_PRIVACY, weights="uniform")
        replies = [train_reply(r, delta_for(r, strategy, size[r.metadata.dst_node_id])) for r in ask(strategy)]
        strategy.aggregate_train(1, reversed(replies) if backwards else replies)
        assert strategy.tally.accepted == 4
        results.append(values(strategy))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_request_carries_exactly_the_nodes_part():
    strategy = make_strategy(nodes=4)
    now = values(strategy)
    for request in ask(strategy, 2):
        document = decode(request.content, TrainRequest)
        assert (document.round, document.run_id, document.plan) == (2, "1", strategy.plan)
        assert len(document.held[0]) == 3
        tensors = received(request, strategy)
        assert set(tensors) == set(parameters.select(now, document.held))
        assert len(tensors) < len(now)
        assert all(torch.equal(t, now[n]) for n, t in tensors.items())
        assert request.metadata.group_id == "2"


def test_requests_follow_the_seed_and_the_round():
    def parts(seed, round_number):
        requests = ask(make_strategy(nodes=4, seed=seed), round_number)
        return [(r.metadata.dst_node_id, held_of(r)[0]) for r in requests]

    assert parts(1, 1) == parts(1, 1)
    assert len({tuple(sorted(parts(s, r))) for s, r in [(1, 1), (1, 2), (2, 1)]}) == 3


def test_an_empty_poisson_round_asks_nobody_and_goes_on():
    strategy = make_strategy(nodes=2, cohort={"kind": "poisson", "rate": 1e-9})
    assert ask(strategy) == []
    assert strategy.aggregate_train(1, []) == (None, None)
    assert (strategy.tally.asked, strategy.tally.missing, strategy.tally.bytes_down) == (0, 0, 0)


def test_a_small_node_gets_what_it_can_hold():
    strategy = make_strategy(nodes=2)
    node, _ = strategy.nodes[describe(1).fingerprint]
    strategy.nodes[describe(1).fingerprint] = (node, describe(1, expert_capacity=2))
    sizes = {r.metadata.dst_node_id: len(held_of(r)[0]) for r in ask(strategy)}
    assert sizes == {11: 2, 12: 3}


def test_bytes_are_tallied_both_ways():
    be_the_server()
    small, large = (make_strategy(nodes=2, plan=make_plan(model=make_config(hidden=h))) for h in (8, 64))
    tallies = []
    for strategy in (small, large):
        requests = ask(strategy)
        strategy.aggregate_train(1, [train_reply(r, delta_for(r, strategy)) for r in requests])
        floats = sum(t.numel() for r in requests for t in delta_for(r, strategy).values())
        # float32 payload, and per message at most 12 KiB of names, plan and Flower's object headers
        for count in (strategy.tally.bytes_down, strategy.tally.bytes_up):
            assert 4 * floats < count < 4 * floats + 2 * 12_288
        assert 4 * sum(t.numel() for t in values(strategy).values()) * 2 < strategy.full_model_bytes()
        tallies.append(strategy.tally)
    assert tallies[0].bytes_down < tallies[1].bytes_down
    assert tallies[0].bytes_up < tallies[1].bytes_up


def test_a_node_that_answers_often_does_not_hide_the_silent_ones():
    strategy = make_strategy(nodes=4)
    first, *_ = ask(strategy)
    reply = train_reply(first, delta_for(first, strategy))
    strategy.aggregate_train(1, [reply, reply, reply])
    assert (strategy.tally.accepted, strategy.tally.dropped, strategy.tally.missing) == (1, 2, 3)


INT8 = make_plan(traffic={"delta": "int8"})


def encoded(request, delta, strategy, secret=bytes(32)):
    shapes = parameters.shapes(strategy.plan.model, held_of(request))
    return wire_form(shapes, encodings_of(strategy.plan.traffic.delta, shapes)).encode(delta, secret)


@pytest.mark.parametrize("encoding", ["bf16", "int8"])
def test_rounded_deltas_are_averaged_as_what_they_stand_for(encoding):
    strategy = make_strategy(nodes=1, plan=make_plan(traffic={"delta": encoding}))
    before = values(strategy)
    (request,) = ask(strategy)
    generator = torch.Generator().manual_seed(5)
    delta = {n: 0.01 * torch.randn(t.shape, generator=generator) for n, t in delta_for(request, strategy).items()}
    strategy.aggregate_train(1, [train_reply(request, encoded(request, delta, strategy))])
    assert strategy.tally.accepted == 1
    for name, tensor in values(strategy).items():
        if name not in delta:
            assert torch.equal(tensor, before[name])
            continue
        rows = (delta[name].reshape(1, -1) if delta[name].ndim < 2 else delta[name].flatten(1)).abs()
        step = rows.amax(1, keepdim=True) / 126 if encoding == "int8" else rows * 2**-7
        moved = (tensor - before[name] - delta[name]).reshape(rows.shape).abs()
        assert (moved < step + 1e-7).all()
        assert moved.max() > 0.1 * step.min()


SCALES = "packed/int8-scales"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda sent: sent | {SCALES: sent[SCALES].index_fill(0, torch.tensor([2]), math.nan)},
        lambda sent: sent | {SCALES: -sent[SCALES]},
        lambda sent: sent | {SCALES: sent[SCALES] * 1e6},  # over the norm bound
        lambda sent: sent | {SCALES: sent[SCALES].float()},
        lambda sent: sent | {SCALES: sent[SCALES][1:]},
        lambda sent: sent | {"packed/int8": torch.full_like(sent["packed/int8"], -128)},
        lambda sent: sent | {"packed/int8": sent["packed/int8"].view(torch.uint8)},
        lambda sent: sent | {"load/0": torch.ones(6)},
        lambda sent: {SCALES: sent[SCALES]},
    ],
)
def test_a_bad_int8_reply_is_dropped_and_a_good_one_still_counts(spoil):
    strategy = make_strategy(nodes=2, plan=INT8)
    bad, good = ask(strategy)
    bodies = {request: encoded(request, delta_for(request, strategy), strategy) for request in (bad, good)}
    strategy.aggregate_train(1, [train_reply(bad, spoil(bodies[bad])), train_reply(good, bodies[good])])
    assert (strategy.tally.accepted, strategy.tally.dropped) == (1, 1)


def test_the_encoding_is_the_plans_and_nobody_elses():
    for plan, other in ((INT8, make_plan()), (make_plan(), INT8)):
        strategy, odd = make_strategy(nodes=1, plan=plan), make_strategy(nodes=1, plan=other)
        (request,) = ask(strategy)
        strategy.aggregate_train(1, [train_reply(request, encoded(request, delta_for(request, strategy), odd))])
        assert (strategy.tally.accepted, strategy.tally.dropped) == (0, 1)


@pytest.mark.parametrize(("share", "accepted"), [(0.999, 1), (1.2, 0)])
def test_an_honest_delta_at_the_norm_bound_passes_however_it_was_rounded(monkeypatch, share, accepted):
    """All values of a row just above a step and rounded up, a row's largest value aside: longer than the bound."""
    strategy = make_strategy(nodes=1, plan=INT8)
    (request,) = ask(strategy)
    delta = delta_for(request, strategy)
    for tensor in delta.values():
        rows = tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.flatten(1)
        rows.fill_(1.001 * 2**-7 * 1.015625)
        rows[:, 0] = 1.0
    count = sum(tensor.numel() for tensor in delta.values())
    bound = 3 * 0.5 * 3 * (1.5 + 2.0 * 1.5 * math.sqrt(count) / (0.5 * 100))
    long = math.hypot(*(float(tensor.norm()) for tensor in delta.values()))
    delta = {name: tensor * (share * bound / long) for name, tensor in delta.items()}
    monkeypatch.setattr(
        conclave.protocol.encodings, "uniform_words", lambda secret, n: np.full(n, 2**64 - 1, dtype=np.uint64)
    )
    sent = encoded(request, delta, strategy)
    shapes = parameters.shapes(strategy.plan.model, held_of(request))
    arrived = unpack(pack(sent), shapes, encodings_of("int8", shapes))
    assert math.hypot(*(float(tensor.norm()) for tensor in arrived.values())) > bound
    strategy.aggregate_train(1, [train_reply(request, sent)])
    assert (strategy.tally.accepted, strategy.tally.dropped) == (accepted, 1 - accepted)


def test_a_model_in_bfloat16_travels_rounded_and_stays_as_it_is():
    strategy = make_strategy(nodes=2, plan=make_plan(traffic={"model": "bf16"}))
    before = values(strategy)
    for request in ask(strategy):
        shapes = parameters.shapes(strategy.plan.model, held_of(request))
        arrived = tensors_of(request.content, shapes, encodings_of("bf16", shapes))
        assert all(torch.equal(tensor, before[name].bfloat16().float()) for name, tensor in arrived.items())
        assert not all(torch.equal(tensor, before[name]) for name, tensor in arrived.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in values(strategy).items())


def test_an_overflowing_delta_without_privacy_is_dropped_in_every_encoding():
    for encoding in ("fp32", "bf16", "int8"):
        strategy = make_strategy(nodes=1, plan=NO_PRIVACY.model_copy(update={"traffic": TrafficConfig(delta=encoding)}))
        for number, bad in enumerate((math.nan, math.inf, 3.4e38), start=1):
            (request,) = ask(strategy, number)
            delta = delta_for(request, strategy)
            next(iter(delta.values())).view(-1)[0] = bad
            strategy.aggregate_train(number, [train_reply(request, encoded(request, delta, strategy))])
            assert (strategy.tally.accepted, strategy.tally.dropped) == (0, 1)
