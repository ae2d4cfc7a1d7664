"""Who can take part: nodes that answer, with a key of their own and room for ``top_k`` experts."""

from __future__ import annotations

import pytest
from flwr.app import ConfigRecord, Error, RecordDict
from server_samples import be_the_server, describe, reply_with

from conclave.base.errors import RunFailedError
from conclave.protocol.codec import encode
from conclave.protocol.messages import QUERY_DESCRIBE, Refusal
from conclave.server.roster import Roster
from conclave.server.scenario import read_scenario
from conclave.simulations.shipped import find


class Answers:
    """Of Flower's Grid, what the first question uses; ``contents``: node → what it answers, None for silence."""

    def __init__(self, contents, backwards=False):
        self.contents = contents
        self.backwards = backwards

    def get_node_ids(self):
        return list(self.contents)

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for message in messages:
            assert message.metadata.message_type == QUERY_DESCRIBE
            message.metadata.__dict__["_message_id"] = f"m{message.metadata.dst_node_id}"
            content = self.contents[message.metadata.dst_node_id]
            if content is not None:
                replies.append(reply_with(message, content))
        return reversed(replies) if self.backwards else replies


def described(contents, backwards=False):
    be_the_server()
    scenario = read_scenario(find("digits"), {"federation.min_holders": 0, "partition.nodes": max(1, len(contents))})
    return Roster(Answers(contents, backwards), scenario, None, "1").describe()


def test_every_good_answer_counts():
    answers = {n: describe(n) for n in (3, 1, 2)}
    assert described({n: encode(d) for n, d in answers.items()}) == answers


@pytest.mark.parametrize(
    "content",
    [
        None,
        RecordDict(),
        RecordDict({"document": ConfigRecord({"json": "{}"})}),
        RecordDict({"document": ConfigRecord({"json": '{"version": 2}'})}),
        encode(Refusal(code="not-enrolled")),
        Error(code=0, reason="the app crashed"),
    ],
)
def test_a_node_without_a_good_answer_is_left_out(content):
    assert described({1: encode(describe(1)), 2: content}) == {1: describe(1)}


@pytest.mark.parametrize("backwards", [False, True])
def test_a_borrowed_key_is_left_out_whatever_the_order_of_answers(backwards):
    copied = describe(1, declared_size=5)
    found = described({7: encode(describe(1)), 8: encode(copied), 9: encode(describe(3))}, backwards)
    assert found == {7: describe(1), 9: describe(3)}


@pytest.mark.parametrize(("capacity", "taken"), [(1, False), (2, True), (3, True)])
def test_a_node_too_small_for_top_k_is_left_out(capacity, taken):
    found = described({1: encode(describe(1)), 2: encode(describe(2, expert_capacity=capacity))})
    assert set(found) == ({1, 2} if taken else {1})


def test_a_key_that_was_left_out_for_its_size_does_not_block_another():
    found = described({1: encode(describe(1, expert_capacity=1)), 2: encode(describe(1))})
    assert found == {2: describe(1)}


@pytest.mark.parametrize("contents", [{}, {1: None}, {1: encode(Refusal(code="not-enrolled"))}])
def test_nobody_is_a_failed_run(contents, monkeypatch):
    monkeypatch.setattr("conclave.server.roster._NODES_APPEAR_WITHIN_S", 0.0)
    with pytest.raises(RunFailedError, match=r"no node can take part \(.*\), must be at least one"):
        described(contents)


def test_nodes_that_register_late_are_waited_for(monkeypatch):
    """Flower starts the ServerApp first; the clock is the test's own."""

    class Late(Answers):
        def get_node_ids(self):
            return list(self.contents)[: max(0, len(naps) - 1)]

    naps, now = [], [0.0]
    monkeypatch.setattr("conclave.server.roster.time.monotonic", lambda: now[0])
    monkeypatch.setattr(
        "conclave.server.roster.time.sleep", lambda seconds: (naps.append(seconds), now.__setitem__(0, now[0] + 1))
    )
    be_the_server()
    answers = {n: describe(n) for n in (1, 2, 3)}
    late = Late({n: encode(d) for n, d in answers.items()})
    assert Roster(late, read_scenario(find("digits"), {"partition.nodes": 3}), None, "1").describe() == answers
    assert len(naps) == 4
    naps.clear()
    now[0] = 0.0
    described_three = Roster(
        late, read_scenario(find("digits")), None, "1"
    ).describe()  # ten never come: five seconds, no more
    assert described_three == answers
    assert len(naps) == 5
