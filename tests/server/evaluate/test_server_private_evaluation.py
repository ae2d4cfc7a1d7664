"""Answers of nodes that measured: pooled where they hold, dropped and counted where they do not."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
import torch
from flwr.app import Message
from server_samples import SmallFederation, describe, key_of, make_plan, reply_with

from conclave.privacy.ledger import SignedHead
from conclave.privacy.ledger.heads import public_hex
from conclave.protocol.codec import body_of, decode, encode
from conclave.protocol.messages import EvaluateReply, EvaluateRequest, HeldOutSide, Refusal
from conclave.protocol.tensor_array import pack
from conclave.server.evaluate.private import PrivateEvaluation
from conclave.server.replies.receipts import ReceiptBook, read_receipts
from conclave.server.rounds.terms import Books

NODES = 4
PLAN = make_plan(evaluation={"every": 4, "noise_multiplier": 3.0})


def aside_key(number: int):
    """The key of a node's ledger for held-out units."""
    return key_of(100 + number)


def side_of(number: int) -> HeldOutSide:
    return HeldOutSide(public_key=public_hex(aside_key(number)), share=0.2)


def evaluating(plan=PLAN, without=()) -> SmallFederation:
    made = SmallFederation(NODES, plan)
    made.nodes = {
        10 + number: describe(number, held_out=None if number in without else side_of(number))
        for number in range(1, NODES + 1)
    }
    return made


def ask(made: SmallFederation, round_number: int = 4) -> list[Message]:
    requests = made.evaluation_requests(round_number).messages()
    for place, request in enumerate(requests):
        request.metadata.__dict__["_message_id"] = f"question-{round_number}-{place}"
    return requests


def number_of(request: Message) -> int:
    return request.metadata.dst_node_id - 10


def charge_id_of(request: Message, ledger_id: str) -> str:
    """As rule 9 of docs/privacy.md defines it, for the ledger that pays."""
    document = decode(request.content, EvaluateRequest)
    held = {str(layer): list(ids) for layer, ids in sorted(document.held.items())}
    text = json.dumps({"held": held}, separators=(",", ":"))
    model_in = hashlib.sha256(text.encode() + body_of(request.content)).hexdigest()
    parts = [document.run_id, document.round, ledger_id, document.plan.hash, model_in, "evaluate"]
    return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()


def answer(request: Message, sums=(15.0, 5.0), *, signer=None, ledger_id=None, charge_id=None, seq=5, **tensors):
    """An honest answer, but for what is given."""
    ledger = ledger_id or side_of(number_of(request)).ledger_id
    receipt = SignedHead.sign(signer or aside_key(number_of(request)), ledger, seq, f"{seq:064x}")
    reply = EvaluateReply(charge_id=charge_id or charge_id_of(request, ledger), receipt=receipt)
    return reply_with(request, encode(reply, pack(tensors or {"metric/accuracy": torch.tensor(sums)})))


def outcome(made: SmallFederation, replies, round_number: int = 4) -> PrivateEvaluation:
    """What a round measures in which nobody trains."""
    found = made.round(round_number, train=lambda _: (), evaluate=lambda _: replies).private
    assert found is not None
    return found


def test_nothing_is_asked_where_nothing_is_due_or_planned():
    assert [number for number in range(1, 11) if ask(evaluating(), number)] == [4, 8, 10]
    assert ask(evaluating(make_plan())) == []


def test_only_nodes_that_hold_units_out_are_asked_with_the_receipt_of_that_ledger():
    made = evaluating(without=(2, 3))
    requests = ask(made)
    assert [number_of(request) for request in requests] == [1, 4]
    outcome(made, [answer(request) for request in requests])
    for request in ask(made, 8):
        receipt = decode(request.content, EvaluateRequest).receipt
        assert receipt.ledger_id == side_of(number_of(request)).ledger_id


def test_experts_are_those_of_the_round_or_all_where_they_fit():
    assigned = [decode(request.content, EvaluateRequest).held for request in ask(evaluating())]
    assert all(len(held[0]) == 3 for held in assigned)
    everything = make_plan(evaluation={"every": 4, "noise_multiplier": 3.0, "experts": "all"})
    made = evaluating(everything)
    made.nodes = {11: describe(1, held_out=side_of(1)), 12: describe(2, held_out=side_of(2), expert_capacity=4)}
    sizes = {number_of(r): len(decode(r.content, EvaluateRequest).held[0]) for r in ask(made)}
    assert sizes == {1: 6, 2: 3}


def test_sums_are_pooled_over_units_and_averaged_over_nodes():
    made = evaluating()
    given = {1: (15.0, 5.0), 2: (20.0, 20.0), 3: (70.0, 5.0), 4: (1.0, 2.0)}  # the fourth: below its noise
    found = outcome(made, [answer(request, given[number_of(request)]) for request in reversed(ask(made))])
    assert found.over_units.value == pytest.approx(106 / 138)
    assert found.over_units.noise == pytest.approx(3.0 * math.sqrt(4) * math.hypot(106, 32) / 138**2)
    means = {number: found.by_node[describe(number).fingerprint] for number in given}
    assert [None if mean is None else mean.value for mean in means.values()] == pytest.approx(
        [0.75, 0.5, 70 / 75, None]
    )
    assert found.over_nodes.value == pytest.approx((0.75 + 0.5 + 70 / 75) / 3)
    line = json.loads(json.dumps(found.document()))
    assert line["over_units"] == pytest.approx([106 / 138, found.over_units.noise], abs=1e-6)
    assert line["by_node"][describe(4).fingerprint] is None


def test_the_order_of_answers_does_not_matter():
    results = []
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        made = evaluating()
        requests = ask(made)
        answers = [answer(request, (0.1 * number_of(request), 33.3)) for request in requests]
        results.append(outcome(made, [answers[place] for place in order]).document())
    assert results[0] == results[1]


def test_receipts_are_kept_as_of_the_node_and_marked(tmp_path):
    made = evaluating()
    made.books = Books(ReceiptBook(tmp_path / "receipts.jsonl"))
    outcome(made, [answer(request) for request in ask(made)])
    kept = list(read_receipts(tmp_path / "receipts.jsonl"))
    assert {(item.node, item.kind) for item in kept} == {(describe(n).fingerprint, "evaluate") for n in range(1, 5)}
    assert {item.receipt.ledger_id for item in kept} == {side_of(n).ledger_id for n in range(1, 5)}


HOSTILE = {
    "nan": (lambda r: answer(r, (math.nan, 1.0)), "not-finite"),
    "infinite": (lambda r: answer(r, (math.inf, 1.0)), "not-finite"),
    "three sums": (lambda r: answer(r, (1.0, 2.0, 3.0)), "wrong-shape"),
    "another metric": (lambda r: answer(r, loss=torch.tensor([1.0, 2.0])), "other-tensors"),
    "counts beside it": (
        lambda r: answer(r, **{"metric/accuracy": torch.tensor([1.0, 2.0]), "count": torch.tensor([3.0])}),
        "other-tensors",
    ),
    "more units than it can have": (lambda r: answer(r, (400.0, 5.0)), "over-norm"),
    "less than none": (lambda r: answer(r, (-90.0, 100.0)), "over-norm"),
    "signed with the training key": (lambda r: answer(r, signer=key_of(1)), "bad-receipt"),
    "of the training ledger": (
        lambda r: answer(r, signer=key_of(1), ledger_id=describe(1).ledger_id), "bad-receipt"
    ),
    "of another charge": (lambda r: answer(r, charge_id="0" * 64), "wrong-charge"),
    "no answer": (lambda r: reply_with(r, encode(Refusal(code="bad-request"))), "document"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_does_not_hold_is_dropped_and_the_others_count(kind):
    make, reason = HOSTILE[kind]
    made = evaluating()
    first, *others = ask(made)
    found = outcome(made, [make(first), *(answer(request) for request in others)])
    assert found.dropped_by == {reason: 1}
    assert found.over_units.value == pytest.approx(0.75)
    assert describe(1).fingerprint not in found.by_node


def test_a_replay_a_second_answer_and_a_stranger_count_once_at_most():
    made = evaluating()
    requests = ask(made)
    old = [answer(request) for request in requests]
    outcome(made, old)
    again = ask(made, 8)
    answers = [
        reply_with(again[0], old[0].content),
        answer(again[1], seq=9),
        answer(again[1], seq=10),
        *(answer(request, seq=9) for request in again[2:]),
    ]
    found = outcome(made, answers, 8)
    assert found.dropped_by == {"replay": 1, "not-asked": 1}
    assert len(found.by_node) == 3


def test_a_refusal_is_counted_with_its_code():
    made = evaluating()
    first, *others = ask(made)
    refused = reply_with(first, encode(Refusal(code="budget-exhausted")))
    found = outcome(made, [refused, *(answer(request) for request in others)])
    assert (found.refused, found.asked, len(found.by_node)) == ({"budget-exhausted": 1}, 4, 3)


def test_nobody_answers():
    found = outcome(evaluating(), [])
    assert (found.over_units, found.over_nodes, found.by_node) == (None, None, {})
