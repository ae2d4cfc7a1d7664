"""Before round one every node is asked to admit the plan; who refuses is asked nothing more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flwr.app import Error, RecordDict
from server_samples import be_the_server, charge_id_of, describe, key_of, reply_with

from conclave.base.errors import BadInputError, RunFailedError
from conclave.model import parameters
from conclave.privacy.ledger import SignedHead
from conclave.protocol.codec import decode, encode
from conclave.protocol.messages import (
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
)
from conclave.protocol.tensor_array import pack
from conclave.server.run import run_scenario
from conclave.server.run_directory import RunDirectory
from conclave.server.scenario import read_scenario
from conclave.simulations.shipped import find

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
        with pytest.raises(RunFailedError, match=f"{places}, 8 experts × min_holders 1 need 8"):
            run_scenario(nodes, scenario, RunDirectory.create(scenario, tmp_path / places), "5")
        assert nodes.asked[TRAIN] == nodes.asked[QUERY_CLOSE] == []
        assert len(nodes.asked[QUERY_ADMIT]) == admissions


def test_where_nobody_admits_the_plan_nothing_runs(tmp_path):
    refusal = encode(Refusal(code="budget-exhausted"))
    with pytest.raises(RunFailedError, match="no node admits the plan"):
        run(tmp_path, dict.fromkeys((11, 12, 13), refusal))


class Refusing(Nodes):
    """Admit the plan, and refuse these rounds."""

    def __init__(self, rounds, code="budget-exhausted"):
        super().__init__({})
        self.rounds, self.code = rounds, code

    def answer(self, node, kind, message):
        if kind == TRAIN and (decode(message.content, TrainRequest).round, node) in self.rounds:
            return encode(Refusal(code=self.code))
        return super().answer(node, kind, message)


def run_with(nodes, tmp_path, **changes):
    be_the_server()
    scenario = read_scenario(find("digits"), CHANGES | changes)
    directory = RunDirectory.create(scenario, tmp_path / "run")
    run_scenario(nodes, scenario, directory, "5")
    return directory


def test_a_round_that_everybody_refuses_ends_the_run_and_says_why(tmp_path):
    nodes = Refusing({(1, 11), (1, 12), (1, 13)})
    with pytest.raises(
        RunFailedError, match=r"^the run failed: in round 1 every node refused \(3 × budget-exhausted\)"
    ):
        run_with(nodes, tmp_path)
    assert len(nodes.asked[TRAIN]) == 3  # nobody is asked for the second round
    (line,) = RunDirectory.open(tmp_path / "run").metrics()
    assert (line["refused"], line["changed"]) == ({"budget-exhausted": 3}, False)


def test_a_round_that_everybody_was_charged_for_already_does_not_end_the_run(tmp_path):
    """A server that came back from an older copy: nodes sit the round out, and take part in the next."""
    directory = run_with(Refusing({(1, 11), (1, 12), (1, 13)}, code="already-charged"), tmp_path)
    assert [line["accepted"] for line in directory.metrics()] == [0, 3]


def test_a_round_that_one_node_answers_goes_on(tmp_path):
    directory = run_with(Refusing({(1, 11), (1, 12), (2, 13)}), tmp_path)
    assert [line["accepted"] for line in directory.metrics()] == [1, 2]


def test_a_run_in_which_nothing_changed_the_model_does_not_end_well(tmp_path):
    nodes = Refusing({(1, 11), (2, 12)}, code="paused")
    sentence = r"^the run failed: in 2 rounds nothing changed the model \(2 × paused\)$"
    with pytest.raises(RunFailedError, match=sentence):
        run_with(nodes, tmp_path, **{"federation.min_replies": 3})
    assert nodes.asked[QUERY_CLOSE] == [11, 12, 13]  # what is set aside is free again


def test_a_model_that_cannot_be_trained_asks_nobody(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "samples"))
    nodes = Nodes({})
    for source, sentence in (("dropout", "draws from one stream"), ("only_all", "made-up records fails")):
        own = {"model.preset": "own", "model.source": f"sample_models:{source}"}
        with pytest.raises(BadInputError, match=sentence):
            run_with(nodes, tmp_path / source, **own)
    assert not any(nodes.asked.values())
