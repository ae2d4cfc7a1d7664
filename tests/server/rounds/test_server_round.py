"""A whole round: what goes out in which order, what must be on disk before what, and what it does not keep."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from safetensors.torch import load
from server_samples import (
    SmallFederation,
    ask,
    delta_for,
    describe,
    held_of,
    key_of,
    make_plan,
    receipt_for,
    reply_to,
    reply_with,
    train_reply,
)

from conclave.base.canonical import sha256
from conclave.privacy.accounting.mechanisms import SampledGaussian
from conclave.privacy.ledger.heads import public_hex
from conclave.protocol.codec import body_of, decode, encode
from conclave.protocol.messages import EVALUATE, QUERY_CHOOSE, TRAIN, ChooseReply, ChooseRequest, HeldOutSide
from conclave.protocol.tensor_array import pack
from conclave.server.assign.choices import Choices
from conclave.server.node_level.account import NodeAccount
from conclave.server.node_level.config import NodePrivacyConfig
from conclave.server.node_level.rounds import NodeLevelRounds
from conclave.server.replies.receipts import ReceiptBook
from conclave.server.rounds.terms import Books


def answers(federation):
    return lambda requests: [train_reply(request, delta_for(request, federation)) for request in requests]


def choice(request, ids):
    """The answer of node 1 to the question which experts it wants, charged as the node works it out."""
    asked, ledger = decode(request.content, ChooseRequest), describe(1).ledger_id
    named = [asked.run_id, asked.round, ledger, asked.plan.hash, sha256(body_of(request.content)), "choose"]
    charge_id = sha256(json.dumps(named, separators=(",", ":")).encode())
    reply = ChooseReply(charge_id=charge_id, receipt=receipt_for(request))
    return reply_with(request, encode(reply, pack({"choice/0": torch.tensor(ids, dtype=torch.float32)})))


def test_what_a_node_chose_holds_in_that_very_round_and_nodes_measure_what_it_came_to():
    plan = make_plan(
        affinity={"epsilon": 0.5, "every": 2, "experts": 3}, evaluation={"every": 3, "noise_multiplier": 3.0}
    )
    federation = SmallFederation(plan=plan, assignment="affinity", min_holders=0)
    federation.books = Books(ReceiptBook(), Choices(plan))
    side = HeldOutSide(public_key=public_hex(key_of(101)), share=0.2)
    federation.nodes = {11: describe(1, held_out=side), 12: describe(2)}
    held, measured = [], []

    def train(requests):
        held.append(held_of(requests[0]))
        return answers(federation)(requests)

    def evaluate(requests):
        measured.extend(requests)
        return ()

    for number in range(1, 4):
        federation.round(number, train, evaluate, choose=lambda asked: [choice(asked[0], (4.0, 0.0, 2.0))])
    assert federation.sent == [TRAIN, TRAIN, QUERY_CHOOSE, TRAIN, EVALUATE]
    assert held[2] == {0: (0, 2, 4)} != held[1]
    (request,) = measured
    assert all(torch.equal(t, federation.model.tensors[n]) for n, t in load(body_of(request.content)).items())


class FullDisk(ReceiptBook):
    def save(self):
        raise OSError("no space")


def test_nothing_is_done_with_replies_whose_receipts_are_not_on_disk(tmp_path):
    path = tmp_path / "node-level.db"
    config = NodePrivacyConfig(epsilon=20.0, delta=1e-3, clip=0.5, nodes=4)
    NodeAccount.begin_simulated(path, config, seed=1)
    mechanism = SampledGaussian(sampling_rate=1.0, noise_multiplier=1.5, steps=1)
    account = NodeAccount.open(path, config, seed=1)
    level = NodeLevelRounds(
        account, config=config, mechanism=mechanism, plan=make_plan(), run_id="1", experts_per_node=3, seed=1
    )
    for federation in (SmallFederation(), SmallFederation(weights="uniform", node_level=level)):
        federation.books = Books(FullDisk(), None, federation.books.node_level)
        before = federation.values()
        with pytest.raises(OSError, match="no space"):
            federation.round(1, answers(federation))
        assert all(torch.equal(tensor, before[name]) for name, tensor in federation.values().items())
    assert [entry.state for entry in account.ledger.entries()] == ["RESERVED"]  # drawn, and nothing published


def test_a_round_keeps_no_reply_while_the_next_one_is_made():
    """A thousand nodes must not need a thousand models: a mean adds a reply and forgets it."""
    federation = SmallFederation()
    made: list[weakref.ref] = []

    def one_by_one(requests):
        for request in requests:
            assert [delta() for delta in made[:-1]] == [None] * len(made[:-1])
            delta = delta_for(request, federation)
            reply = reply_with(request, encode(reply_to(request), delta))  # as within one process, by no copy
            made.append(weakref.ref(delta["shared/head.score.weight"]))
            del delta
            yield reply
            del reply

    assert federation.round(1, one_by_one).replies.accepted == len(made) == 4


def test_the_experts_that_were_trained_are_told_in_the_order_of_the_replies():
    federation = SmallFederation()
    requests = list(reversed(ask(federation)))
    outcome = federation.answer(1, [train_reply(request, delta_for(request, federation)) for request in requests])
    assert outcome.replies.trained == tuple(held_of(request) for request in requests)
    assert (outcome.number, outcome.nodes, outcome.asked, outcome.changed) == (1, 4, 4, True)
