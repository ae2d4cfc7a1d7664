"""Every kind of bad reply is dropped, counted under its reason, and leaves no trace; good ones still count."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch
from flwr.app import ArrayRecord, Error, Message, RecordDict
from safetensors.torch import save
from server_samples import (
    SmallFederation,
    ask,
    be_the_server,
    charge_id_of,
    delta_for,
    describe,
    document,
    held_of,
    key_of,
    receipt_for,
    reply_to,
    reply_with,
    train_reply,
)

from conclave.model import parameters
from conclave.privacy.ledger import SignedHead
from conclave.protocol.codec import body_of, decode, encode
from conclave.protocol.messages import CODES, Refusal, TrainReply, TrainRequest
from conclave.protocol.tensor_array import pack
from conclave.server.replies.receipts import EMPTY_RECEIPT


def values(federation):
    return {name: t.clone() for name, t in federation.model.tensors.items()}


def state(federation):
    return {(n, k): t.clone() for n, kept in federation.model.checkpoint(1).optimizer.items() for k, t in kept.items()}


def with_tensor(delta, pick, change):
    name = next(n for n in sorted(delta) if n.startswith(pick))
    return delta | {name: change(delta[name])}


# Each makes a bad reply out of a request: (request, its honest delta) → reply.
def no_document(request, delta):
    return reply_with(request, RecordDict({"other": ArrayRecord()}))


def nothing(request, delta):
    return reply_with(request, RecordDict())


def no_json(request, delta):
    return reply_with(request, document("{", pack(delta)))


def deep_json(request, delta):
    return reply_with(request, document("[" * 100_000, pack(delta)))


def an_extra_field(request, delta):
    text = json.dumps(reply_to(request).model_dump() | {"loss": 0.25})
    return reply_with(request, document(text, pack(delta)))


def a_description(request, delta):
    return reply_with(request, encode(describe(1), pack(delta)))


def a_refusal_with_junk(request, delta):
    text = json.dumps(Refusal(code="budget-exhausted").model_dump() | {"records": 17})
    return reply_with(request, document(text, pack(delta)))


def a_refusal_with_a_made_up_code(request, delta):
    return reply_with(request, document('{"version": 2, "code": "label-7-was-empty"}'))


def no_tensors(request, delta):
    return reply_with(request, encode(reply_to(request)))


def a_pickle(request, delta):
    content = encode(reply_to(request), pack(delta))
    content["tensors"]["body"].stype = "pickle"
    return reply_with(request, content)


def garbage_tensors(request, delta):
    return reply_with(request, encode(reply_to(request), b"\x08" + b"\x00" * 40))


def random_bytes(request, delta):
    generator = torch.Generator().manual_seed(3)
    return reply_with(
        request, encode(reply_to(request), bytes(torch.randint(256, (999,), generator=generator).tolist()))
    )


def cut_short(request, delta):
    return reply_with(request, encode(reply_to(request), pack(delta)[:-1]))


def oversized(request, delta):
    return train_reply(request, delta | {"shared/ballast": torch.zeros(100_000)})


def oversized_zeros(request, delta):
    return reply_with(request, encode(reply_to(request), bytes(10_000_000)))


def a_missing_tensor(request, delta):
    return train_reply(request, {n: t for n, t in delta.items() if n != "shared/head.score.weight"})


def an_odd_name(request, delta):
    return train_reply(request, delta | {"shared/../../etc": torch.ones(1)})


def another_expert(request, delta):
    (mine,) = held_of(request).values()
    other = min(set(range(6)) - set(mine))
    renamed = {n.replace(f"/0/{mine[0]}/", f"/0/{other}/"): t for n, t in delta.items()}
    return train_reply(request, renamed)


def one_expert_too_many(request, delta):
    (mine,) = held_of(request).values()
    other = min(set(range(6)) - set(mine))
    extra = {n.replace(f"/0/{mine[0]}/", f"/0/{other}/"): t.clone() for n, t in delta.items() if f"/0/{mine[0]}/" in n}
    return train_reply(request, delta | extra)


def wrong_shape(request, delta):
    return train_reply(request, with_tensor(delta, "expert/", lambda t: t.T.contiguous()))


def flat_shape(request, delta):
    return train_reply(request, with_tensor(delta, "shared/", torch.flatten))


def wrong_type(request, delta):
    return reply_with(request, encode(reply_to(request), save(with_tensor(delta, "shared/", lambda t: t.half()))))


def a_nan(request, delta):
    return train_reply(request, with_tensor(delta, "router/", lambda t: t.index_fill(0, torch.tensor([1]), math.nan)))


def an_infinity(request, delta):
    return train_reply(request, with_tensor(delta, "expert/", lambda t: t / 0.0))


def overflowing(request, delta):
    return train_reply(request, {n: torch.full_like(t, 3e38) for n, t in delta.items()})


def over_the_norm(request, delta):
    return train_reply(request, {n: torch.full_like(t, 1e6) for n, t in delta.items()})


def a_flower_error(request, delta):
    return reply_with(request, Error(code=0, reason="the app crashed"))


def a_receipt_of_nobody(request, delta):
    return train_reply(request, delta, EMPTY_RECEIPT)


def a_receipt_with_another_key(request, delta):
    good = receipt_for(request)
    return train_reply(request, delta, SignedHead.sign(key_of(9), good.ledger_id, good.seq, good.hash))


def document_of(request):
    return decode(request.content, TrainRequest)


def _charged(request, delta, charge_id):
    return reply_with(request, encode(TrainReply(charge_id=charge_id, receipt=receipt_for(request)), pack(delta)))


def a_made_up_charge(request, delta):
    return _charged(request, delta, "0" * 64)


def _charge_of_another(request, **changes):
    """The charge for the same weights under another round, run, plan or assignment."""
    other = encode(document_of(request).model_copy(update=changes), body_of(request.content))
    return charge_id_of(Message(other, request.metadata.dst_node_id, "train"))


def a_reply_of_another_run(request, delta):
    return _charged(request, delta, _charge_of_another(request, run_id="2"))


def a_reply_of_another_round(request, delta):
    return _charged(request, delta, _charge_of_another(request, round=document_of(request).round + 1))


def a_reply_of_another_plan(request, delta):
    plan = document_of(request).plan.model_copy(update={"noise_multiplier": 0.1})
    return _charged(request, delta, _charge_of_another(request, plan=plan))


def a_reply_for_another_assignment(request, delta):
    (mine,) = held_of(request).values()
    return _charged(request, delta, _charge_of_another(request, held={0: tuple(e for e in range(6) if e not in mine)}))


BAD = {
    no_document: "document",
    nothing: "document",
    no_json: "document",
    deep_json: "document",
    an_extra_field: "document",
    a_description: "document",
    a_refusal_with_junk: "document",
    a_refusal_with_a_made_up_code: "document",
    no_tensors: "no-tensors",
    a_pickle: "no-tensors",
    garbage_tensors: "undecodable",
    random_bytes: "undecodable",
    cut_short: "undecodable",
    oversized: "oversized",
    oversized_zeros: "oversized",
    a_missing_tensor: "other-tensors",
    an_odd_name: "other-tensors",
    another_expert: "other-tensors",
    one_expert_too_many: "other-tensors",
    wrong_shape: "wrong-shape",
    flat_shape: "wrong-shape",
    wrong_type: "wrong-shape",
    a_nan: "not-finite",
    an_infinity: "not-finite",
    overflowing: "not-finite",
    over_the_norm: "over-norm",
    a_flower_error: "no-answer",
    a_receipt_of_nobody: "bad-receipt",
    a_receipt_with_another_key: "bad-receipt",
    a_made_up_charge: "wrong-charge",
    a_reply_of_another_run: "wrong-charge",
    a_reply_of_another_round: "wrong-charge",
    a_reply_of_another_plan: "wrong-charge",
    a_reply_for_another_assignment: "wrong-charge",
}


@pytest.mark.parametrize(("spoil", "reason"), BAD.items())
@pytest.mark.parametrize("first", [True, False])
def test_a_bad_reply_is_dropped_for_its_reason_and_a_good_one_still_counts(spoil, reason, first):
    federation = SmallFederation(nodes=2)
    before = values(federation)
    bad, good = ask(federation)
    replies = [spoil(bad, delta_for(bad, federation)), train_reply(good, delta_for(good, federation))]
    outcome = federation.answer(1, replies if first else reversed(replies))
    assert outcome.replies.dropped_by == {reason: 1}
    assert (outcome.asked, outcome.replies.accepted, outcome.replies.dropped, outcome.replies.missing) == (2, 1, 1, 0)
    assert outcome.replies.refused == Counter()
    expected = parameters.shapes(federation.plan.model, held_of(good))
    for name, tensor in values(federation).items():
        assert torch.equal(tensor, before[name] + 0.001 if name in expected else before[name]), name
    assert outcome.changed


@pytest.mark.parametrize(("spoil", "reason"), BAD.items())
def test_a_round_of_bad_replies_changes_nothing(spoil, reason):
    federation = SmallFederation(nodes=3, optimizer={"momentum": 0.9})
    requests = ask(federation)
    federation.answer(1, [train_reply(r, delta_for(r, federation)) for r in requests])
    before, momentum = values(federation), state(federation)
    requests = ask(federation, 2)
    outcome = federation.answer(2, [spoil(r, delta_for(r, federation)) for r in requests])
    assert (outcome.replies.accepted, outcome.replies.dropped_by, outcome.changed) == (0, {reason: 3}, False)
    assert all(torch.equal(t, before[n]) for n, t in values(federation).items())
    assert momentum
    assert all(torch.equal(t, momentum[n]) for n, t in state(federation).items())


@pytest.mark.parametrize("code", [code for code in CODES if code != "bad-request"])
def test_tensors_beside_a_refusal_are_not_looked_at(code):
    federation = SmallFederation(nodes=2)
    before = values(federation)
    outcome = federation.round(
        1,
        lambda requests: [
            reply_with(request, encode(Refusal(code=code), pack(delta_for(request, federation))))
            for request in requests
        ],
    )
    assert outcome.replies.refused == {code: 2}
    assert outcome.replies.dropped_by == {}
    assert all(torch.equal(t, before[n]) for n, t in values(federation).items())


def second_round(federation, answer):
    """Answer round 1 honestly, round 2 with ``answer(request, reply of round 1)``; return model and outcome."""
    (first,) = ask(federation)
    reply = train_reply(first, delta_for(first, federation))
    assert federation.answer(1, [reply]).replies.accepted == 1
    before = values(federation)
    (request,) = ask(federation, 2)
    return before, federation.answer(2, [answer(request, reply)])


def replayed(request, old):
    return reply_with(request, old.content)


def the_old_receipt_under_the_new_charge(request, old):
    receipt = decode(old.content, TrainReply).receipt
    return reply_with(request, encode(reply_to(request, receipt), body_of(old.content)))


def the_old_charge_under_a_new_receipt(request, old):
    charge_id = decode(old.content, TrainReply).charge_id
    return reply_with(
        request, encode(TrainReply(charge_id=charge_id, receipt=receipt_for(request)), body_of(old.content))
    )


@pytest.mark.parametrize("answer", [replayed, the_old_receipt_under_the_new_charge, the_old_charge_under_a_new_receipt])
def test_what_answered_an_earlier_round_is_a_replay(answer):
    federation = SmallFederation(nodes=1, experts_per_node=6, assignment="all")  # the same experts in both rounds
    before, outcome = second_round(federation, answer)
    assert outcome.replies.dropped_by == {"replay": 1}
    assert all(torch.equal(t, before[n]) for n, t in values(federation).items())
    assert len(federation.books.receipts._known) == 1


def test_a_round_that_is_run_again_takes_the_stored_reply():
    """After a crash between receipts and checkpoint the same question comes again, and the same answer."""
    once, again = SmallFederation(nodes=1), SmallFederation(nodes=1)
    (request,) = ask(once)
    reply = train_reply(request, delta_for(request, once))
    once.answer(1, [reply])
    again.books = once.books
    (request,) = ask(again)
    outcome = again.answer(1, [reply_with(request, reply.content)])
    assert outcome.replies.accepted == 1
    assert all(torch.equal(t, values(once)[n]) for n, t in values(again).items())


def test_a_round_that_is_run_again_takes_no_second_receipt_for_its_charge():
    """One charge is one release: two receipts for it would be two."""
    once, again = SmallFederation(nodes=1), SmallFederation(nodes=1)
    (request,) = ask(once)
    once.answer(1, [train_reply(request, delta_for(request, once))])
    again.books = once.books
    (request,) = ask(again)
    outcome = again.answer(1, [train_reply(request, delta_for(request, again, 0.002))])  # its receipt is a later one
    assert outcome.replies.dropped_by == {"replay": 1}


def test_another_nodes_reply_is_no_reply():
    federation = SmallFederation(nodes=2, experts_per_node=6, assignment="all")
    one, two = ask(federation)
    honest = train_reply(one, delta_for(one, federation))
    outcome = federation.answer(1, [honest, reply_with(two, honest.content)])
    assert (outcome.replies.accepted, outcome.replies.dropped_by) == (1, {"bad-receipt": 1})


@pytest.mark.parametrize(
    ("spoil", "kept"), [(a_nan, 1), (over_the_norm, 1), (a_missing_tensor, 1), (a_made_up_charge, 0)]
)
def test_what_the_node_was_charged_for_has_its_receipt_kept(spoil, kept):
    federation = SmallFederation(nodes=1)
    (request,) = ask(federation)
    outcome = federation.answer(1, [spoil(request, delta_for(request, federation))])
    assert outcome.replies.dropped == 1
    assert len(federation.books.receipts._known) == kept


@pytest.mark.parametrize("size", [10**12 + 1, 10**400])
def test_a_size_that_no_float_holds_is_no_description(size):
    be_the_server()
    with pytest.raises(ValueError, match="less than or equal to 1000000000000"):
        describe(1, declared_size=size)
