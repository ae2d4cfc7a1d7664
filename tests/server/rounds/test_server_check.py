"""Replies made by hand: which are accepted, which are dropped for what, and who is missing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from flwr.app import Message
from server_samples import (
    NO_PRIVACY,
    SmallFederation,
    ask,
    delta_for,
    encoded,
    held_of,
    make_plan,
    reply_with,
    train_reply,
)

import conclave.protocol.encodings
from conclave.model import parameters
from conclave.protocol.codec import encode, unpack
from conclave.protocol.encodings import TrafficConfig, encodings_of
from conclave.protocol.messages import CODES, TRAIN, Refusal
from conclave.protocol.tensor_array import pack

INT8 = make_plan(traffic={"delta": "int8"})


@pytest.mark.parametrize("code", [code for code in CODES if code != "bad-request"])
def test_a_refusal_is_counted_by_its_code(code):
    federation = SmallFederation(nodes=3)
    first, second, good = ask(federation)
    refusals = [reply_with(r, encode(Refusal(code=code))) for r in (first, second)]
    outcome = federation.answer(1, [*refusals, train_reply(good, delta_for(good, federation))])
    assert outcome.replies.refused == {code: 2}
    assert (outcome.replies.accepted, outcome.replies.dropped, outcome.replies.missing) == (1, 0, 0)


def test_silent_nodes_are_missing():
    federation = SmallFederation(nodes=4)
    requests = ask(federation)
    outcome = federation.answer(1, [train_reply(requests[0], delta_for(requests[0], federation))])
    assert (outcome.replies.accepted, outcome.replies.missing) == (1, 3)
    before = federation.values()
    outcome = federation.answer(2, [])
    assert (outcome.replies.accepted, outcome.replies.dropped, outcome.replies.missing) == (0, 0, 4)
    assert not outcome.changed
    assert all(torch.equal(t, before[n]) for n, t in federation.values().items())


def test_the_second_reply_of_a_node_is_dropped():
    federation = SmallFederation(nodes=2)
    before = federation.values()
    one, two = ask(federation)
    replies = [train_reply(one, delta_for(one, federation, 0.001)), train_reply(one, delta_for(one, federation, 0.002))]
    outcome = federation.answer(1, [*replies, train_reply(two, delta_for(two, federation, 0.001))])
    assert (outcome.replies.accepted, outcome.replies.dropped_by) == (2, {"duplicate": 1})
    name = "shared/head.score.weight"
    torch.testing.assert_close(federation.values()[name], before[name] + 0.001, rtol=0, atol=1e-7)


def test_a_reply_from_a_node_that_was_not_asked_is_dropped():
    federation = SmallFederation(nodes=3, cohort={"kind": "fixed", "size": 1})
    before = federation.values()
    (request,) = ask(federation)
    absent = next(11 + n for n in range(3) if 11 + n != request.metadata.dst_node_id)
    replies = []
    for stranger in (absent, 99):
        forged = Message(request.content, dst_node_id=stranger, message_type=TRAIN)
        forged.metadata.__dict__["_message_id"] = "forged"
        replies.append(train_reply(forged, delta_for(request, federation, 5.0)))
    outcome = federation.answer(1, replies)
    assert (outcome.replies.accepted, outcome.replies.dropped_by, outcome.replies.missing) == (0, {"not-asked": 2}, 1)
    assert all(torch.equal(t, before[n]) for n, t in federation.values().items())
    outcome = federation.answer(1, [*replies, train_reply(request, delta_for(request, federation))])
    assert (outcome.replies.accepted, outcome.replies.dropped_by, outcome.replies.missing) == (1, {"not-asked": 2}, 0)


def test_a_reply_of_the_last_round_is_dropped_unless_asked_again():
    federation = SmallFederation(nodes=6, cohort={"kind": "fixed", "size": 2})
    rounds = [ask(federation, r) for r in (1, 2)]
    late = [r for r in rounds[0] if r.metadata.dst_node_id not in {q.metadata.dst_node_id for q in rounds[1]}]
    assert late
    outcome = federation.answer(2, [train_reply(r, delta_for(r, federation)) for r in late])
    assert (outcome.replies.accepted, outcome.replies.dropped) == (0, len(late))


@pytest.mark.parametrize(("share", "accepted"), [(0.999, 1), (1.001, 0)])
@pytest.mark.parametrize("number", [1, 3])
def test_the_norm_bound_uses_the_nodes_own_size_and_parameters(share, accepted, number):
    federation = SmallFederation(nodes=4)
    request = next(r for r in ask(federation) if r.metadata.dst_node_id == 10 + number)
    shapes = parameters.shapes(federation.plan.model, held_of(request))
    count = sum(shape.numel() for shape in shapes.values())
    # 3·lr·steps·(C + σC√d/(q·size)) with the numbers of make_plan and describe
    bound = 3 * 0.5 * 3 * (1.5 + 2.0 * 1.5 * math.sqrt(count) / (0.5 * 100 * number))
    value = share * bound / math.sqrt(count)
    outcome = federation.answer(1, [train_reply(request, delta_for(request, federation, value))])
    assert (outcome.replies.accepted, outcome.replies.dropped) == (accepted, 1 - accepted)


def test_without_privacy_there_is_no_norm_bound():
    federation = SmallFederation(nodes=1, plan=NO_PRIVACY)
    (request,) = ask(federation)
    outcome = federation.answer(1, [train_reply(request, delta_for(request, federation, 1e6))])
    assert outcome.replies.accepted == 1


def test_a_node_that_answers_often_does_not_hide_the_silent_ones():
    federation = SmallFederation(nodes=4)
    first, *_ = ask(federation)
    reply = train_reply(first, delta_for(first, federation))
    outcome = federation.answer(1, [reply, reply, reply])
    assert (outcome.replies.accepted, outcome.replies.dropped, outcome.replies.missing) == (1, 2, 3)


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
    federation = SmallFederation(nodes=2, plan=INT8)
    bad, good = ask(federation)
    bodies = {request: encoded(request, delta_for(request, federation), federation) for request in (bad, good)}
    outcome = federation.answer(1, [train_reply(bad, spoil(bodies[bad])), train_reply(good, bodies[good])])
    assert (outcome.replies.accepted, outcome.replies.dropped) == (1, 1)


def test_the_encoding_is_the_plans_and_nobody_elses():
    for plan, other in ((INT8, make_plan()), (make_plan(), INT8)):
        federation, odd = SmallFederation(nodes=1, plan=plan), SmallFederation(nodes=1, plan=other)
        (request,) = ask(federation)
        outcome = federation.answer(1, [train_reply(request, encoded(request, delta_for(request, federation), odd))])
        assert (outcome.replies.accepted, outcome.replies.dropped) == (0, 1)


@pytest.mark.parametrize(("share", "accepted"), [(0.999, 1), (1.2, 0)])
def test_an_honest_delta_at_the_norm_bound_passes_however_it_was_rounded(monkeypatch, share, accepted):
    """All values of a row just above a step and rounded up, a row's largest value aside: longer than the bound."""
    federation = SmallFederation(nodes=1, plan=INT8)
    (request,) = ask(federation)
    delta = delta_for(request, federation)
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
    sent = encoded(request, delta, federation)
    shapes = parameters.shapes(federation.plan.model, held_of(request))
    arrived = unpack(pack(sent), shapes, encodings_of("int8", shapes))
    assert math.hypot(*(float(tensor.norm()) for tensor in arrived.values())) > bound
    outcome = federation.answer(1, [train_reply(request, sent)])
    assert (outcome.replies.accepted, outcome.replies.dropped) == (accepted, 1 - accepted)


def test_an_overflowing_delta_without_privacy_is_dropped_in_every_encoding():
    for encoding in ("fp32", "bf16", "int8"):
        federation = SmallFederation(
            nodes=1, plan=NO_PRIVACY.model_copy(update={"traffic": TrafficConfig(delta=encoding)})
        )
        for number, bad in enumerate((math.nan, math.inf, 3.4e38), start=1):
            (request,) = ask(federation, number)
            delta = delta_for(request, federation)
            next(iter(delta.values())).view(-1)[0] = bad
            outcome = federation.answer(number, [train_reply(request, encoded(request, delta, federation))])
            assert (outcome.replies.accepted, outcome.replies.dropped) == (0, 1)
