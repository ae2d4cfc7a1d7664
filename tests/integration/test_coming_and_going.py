"""Digits while nodes come late, leave and return under another Flower id; ledgers and receipts stay in step."""

from __future__ import annotations

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from ledger_samples import entries_of
from safetensors.torch import load

import conclave.simulations.client_app
from conclave.audit.run import audit_run
from conclave.base.errors import RunFailedError
from conclave.privacy.ledger.reading.history import LedgerFile
from conclave.privacy.ledger.reading.verification import audit_history
from conclave.protocol.codec import encode
from conclave.protocol.messages import QUERY_ADMIT, TRAIN, Refusal
from conclave.server.run import run_scenario
from conclave.server.run_directory import RunDirectory
from conclave.server.scenario import read_scenario
from conclave.simulations.engines.inline import InlineGrid
from conclave.simulations.shipped import find
from conclave.simulations.simulate import run_number

CHANGES = {"federation.rounds": 4, "partition.nodes": 4, "federation.optimizer": {"kind": "adam", "decay": 0.5}}


class Changing(InlineGrid):
    """``here``: for the start and then before each later round, the ids that are connected, with their node number."""

    here: tuple[dict[int, int], ...]

    def get_node_ids(self):
        here, *later = self.here
        if later:
            self.here = tuple(later)
        for node, number in here.items():
            if node not in self._contexts:
                config = {"partition-id": number, "num-partitions": CHANGES["partition.nodes"]}
                self._contexts[node] = Context(self._run.run_id, node, config, RecordDict(), self._run_config)
        return list(here)


def run(folder, here=None, client=conclave.simulations.client_app.app, **changes):
    scenario = read_scenario(find("digits"), CHANGES | changes)
    directory = RunDirectory.create(scenario, folder)
    number = run_number(scenario)
    config = {"scenario": scenario.to_toml(), "run-dir": str(directory.path)}
    grid = (Changing if here else InlineGrid)(client, scenario.partition.nodes, number, config, lambda reply: None)
    if here:
        first = min(grid._contexts)
        grid._run_config = config
        grid.here = tuple({first + k if k < 100 else k: v for k, v in ids.items()} for ids in here)
    run_scenario(grid, scenario, directory, str(number))
    return directory


ALL = {0: 0, 1: 1, 2: 2, 3: 3}


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr("conclave.server.roster._NODES_APPEAR_WITHIN_S", 0.0)


def model_of(directory):
    return load((directory.path / "model" / "model.safetensors").read_bytes())


def rounds_charged(directory):
    return [[e.round for e in entries_of(path) if e.state == "COMMITTED"] for path in directory.ledgers]


def test_a_node_under_another_id_is_the_same_to_the_last_bit(tmp_path):
    moved = [ALL, ALL, {0: 0, 1: 1, 900: 2, 3: 3}, {0: 0, 901: 1, 900: 2, 3: 3}]
    whole, again = run(tmp_path / "whole"), run(tmp_path / "moved", moved)
    assert all(torch.equal(tensor, model_of(again)[name]) for name, tensor in model_of(whole).items())
    assert rounds_charged(again) == rounds_charged(whole) == [[1, 2, 3, 4]] * 4
    assert audit_run(again).verdict == "NOT_REFUTED"


def test_who_comes_late_joins_and_who_leaves_is_not_asked(tmp_path):
    directory = run(tmp_path / "run", [{0: 0, 1: 1, 2: 2}, ALL, {0: 0, 3: 3}, {0: 0, 1: 1, 3: 3}])
    lines = directory.metrics()
    assert [line["nodes"] for line in lines] == [3, 4, 2, 3]
    assert [line["accepted"] for line in lines] == [3, 4, 2, 3]
    assert [line["missing"] for line in lines] == [0] * 4
    assert rounds_charged(directory) == [[1, 2, 3, 4], [1, 2, 4], [1, 2], [2, 3, 4]]
    admitted = [sum(e.state == "ADMITTED" for e in entries_of(path)) for path in directory.ledgers]
    assert admitted == [1, 1, 1, 1]
    for path in directory.ledgers:
        audit = audit_history(LedgerFile(path))
        assert audit.findings == []
        assert audit.epsilon <= 8.0
    assert audit_run(directory).findings == []


def test_too_few_holders_names_the_nodes_that_do_not_take_part(tmp_path):
    def client(message, context):
        if message.metadata.message_type == QUERY_ADMIT and context.node_config["partition-id"] > 0:
            return Message(encode(Refusal(code="awaiting-approval")), reply_to=message)
        return conclave.simulations.client_app.app(message, context)

    told = r"1 node × 4 experts hold 4 places, .* need 16; nodes that do not take part: 3 × awaiting-approval$"
    with pytest.raises(RunFailedError, match=told):
        run(tmp_path / "run", client=client, **{"federation.min_holders": 2})


def test_rounds_with_too_few_replies_change_nothing_and_are_paid_for(tmp_path):
    def client(message, context):
        reply = conclave.simulations.client_app.app(message, context)
        round_two = (message.metadata.message_type, message.metadata.group_id) == (TRAIN, "2")
        if round_two and context.node_config["partition-id"] > 0:
            reply.content = encode(Refusal(code="internal-error"))
        return reply

    directory = run(tmp_path / "run", client=client, **{"federation.min_replies": 2})
    lines = directory.metrics()
    assert [line["changed"] for line in lines] == [True, False, True, True]
    assert lines[0]["loss"] == lines[1]["loss"] != lines[2]["loss"]
    assert lines[1]["accepted"] == 1
    assert rounds_charged(directory) == [[1, 2, 3, 4]] * 4
    audit = audit_run(directory)
    assert (audit.findings, audit.unreceived, audit.receipts) == ([], 3, 13)
