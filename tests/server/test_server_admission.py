"""Before round one every node is asked to admit the plan; who refuses is asked nothing more."""

from __future__ import annotations

import pytest
import torch
from flwr.app import Error, RecordDict
from server_samples import be_the_server, charge_id_of, describe, key_of, reply_with

from clients.protocol import (
    QUERY_ADMIT,
    QUERY_CLOSE,
    QUERY_DESCRIBE,
    TRAIN,
    Admission,
    AdmitRequest,
    Closed,
    Refusal,
    TrainReply,
    TrainRequest,
    decode,
    encode,
    pack,
)
from data.shipped_scenarios import find
from model import BadInputError, parameters
from privacy.ledger import SignedHead
from server.app import run_scenario
from server.run_directory import RunDirectory
from server.scenario import read_scenario

CHANGES = {"federation.rounds": 2, "partition.nodes": 3, "model.width": 8}


class Nodes:
    """Three nodes that answer everything; ``refuses``: node → its answer to the question of admission."""

    def __init__(self, refuses, capacity=8):
        self.refuses, self.capacity = refuses, capacity
        self.asked = {kind: [] for kind in (QUERY_DESCRIBE, QUERY_ADMIT, TRAIN, QUERY_CLOSE)}

    def get_node_ids(self):
        return [11, 12, 13]

    def send_and_receive(self, messages, *, timeout=None):
        for message in messages:
            node, kind = message.metadata.dst_node_id, message.metadata.message_type
            message.metadata.__dict__["_message_id"] = f"{kind}-{node}-{len(self.asked[kind])}"
            self.asked[kind].append(node)
            yield reply_with(message, self.answer(node, kind, message))

    def answer(self, node, kind, message):
        if kind == QUERY_DESCRIBE:
            return encode(describe(node - 10, expert_capacity=self.capacity))
        if kind == QUERY_ADMIT:
            plan = decode(message.content, AdmitRequest).plan
            return self.refuses.get(node, encode(Admission(plan_hash=plan.hash)))
        if kind == QUERY_CLOSE:
            return encode(Closed(run_id="5"))
        request = decode(message.content, TrainRequest)
        head = SignedHead.sign(key_of(node - 10), describe(node - 10).ledger_id, request.round, "a" * 64)
        shapes = parameters.shapes(request.plan.model, request.held)
        delta = {name: torch.zeros(shape) for name, shape in shapes.items()}
        return encode(TrainReply(charge_id=charge_id_of(message), receipt=head), pack(delta))


def run(tmp_path, refuses):
    be_the_server()
    scenario = read_scenario(find("digits"), CHANGES)
    directory = RunDirectory.create(scenario, tmp_path / "run")
    nodes = Nodes(refuses)
    run_scenario(nodes, scenario, directory, "5")
    return nodes, directory


def test_everyone_is_asked_once_before_and_once_after(tmp_path):
    nodes, directory = run(tmp_path, {})
    assert nodes.asked[QUERY_ADMIT] == nodes.asked[QUERY_CLOSE] == [11, 12, 13]
    assert sorted(nodes.asked[TRAIN]) == [11, 11, 12, 12, 13, 13]
    assert [line["accepted"] for line in directory.metrics()] == [3, 3]


@pytest.mark.parametrize(
    "answer",
    [
        encode(Refusal(code="budget-exhausted")),
        encode(Refusal(code="not-allowed")),
        encode(Admission(plan_hash="0" * 64)),  # of another plan than was asked about
        RecordDict(),
        Error(code=0, reason="the app crashed"),
    ],
)
def test_who_does_not_admit_the_plan_is_asked_nothing_more(tmp_path, answer):
    nodes, directory = run(tmp_path, {12: answer})
    assert set(nodes.asked[TRAIN]) == {11, 13}
    assert [line["asked"] for line in directory.metrics()] == [2, 2]


def test_too_few_nodes_or_too_small_ones_for_every_expert_train_nothing(tmp_path):
    be_the_server()
    scenario = read_scenario(find("digits"), CHANGES)
    refusal = encode(Refusal(code="budget-exhausted"))
    for nodes, places, admissions in (
        (Nodes({11: refusal, 12: refusal}), "1 node × 4 experts hold 4 places", 3),
        (Nodes({}, capacity=2), "3 nodes × 2 experts hold 6 places", 0),  # told before any budget is set aside
    ):
        with pytest.raises(BadInputError, match=f"{places}, 8 experts × min_holders 1 need 8"):
            run_scenario(nodes, scenario, RunDirectory.create(scenario, tmp_path / places), "5")
        assert nodes.asked[TRAIN] == nodes.asked[QUERY_CLOSE] == []
        assert len(nodes.asked[QUERY_ADMIT]) == admissions


def test_where_nobody_admits_the_plan_nothing_runs(tmp_path):
    refusal = encode(Refusal(code="budget-exhausted"))
    with pytest.raises(BadInputError, match="no node admits the plan"):
        run(tmp_path, dict.fromkeys((11, 12, 13), refusal))
