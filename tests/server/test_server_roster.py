"""Nodes that come late, leave, return under another id, or borrow a key. The clock is the test's own."""

from __future__ import annotations

import pytest
from flwr.app import Error, Message, RecordDict
from server_samples import be_the_server, describe, make_plan, reply_with

from conclave.base.errors import RunFailedError
from conclave.protocol.codec import encode
from conclave.protocol.messages import QUERY_ADMIT, QUERY_CLOSE, QUERY_DESCRIBE, Admission, Closed, Refusal
from conclave.server.roster import Roster, counted
from conclave.server.scenario import read_scenario
from conclave.simulations.shipped import find

PLAN = make_plan()
SILENT = "silent"


def message_to(node, question, message_id):
    message = Message(RecordDict(), dst_node_id=node, message_type=question)
    message.metadata.__dict__["_message_id"] = message_id
    return message


class Net:
    """Of Flower's Grid, what the roster uses. ``here``: connected id → its description; ``answers``: (id, question) →
    something else than a good answer."""

    def __init__(self, here):
        self.here = dict(here)
        self.answers = {}
        self.asked = []
        self.looks = 0
        self.waiting = {}

    def get_node_ids(self):
        self.looks += 1
        return list(self.here)

    def answer(self, message, node, question):
        good = {
            QUERY_DESCRIBE: lambda: encode(self.here[node]),
            QUERY_ADMIT: lambda: encode(Admission(plan_hash=PLAN.hash)),
            QUERY_CLOSE: lambda: encode(Closed(run_id="1")),
        }
        content = self.answers.get((node, question))
        return reply_with(message, good[question]() if content is None else content)

    def deliver(self, message):
        node, question = message.metadata.dst_node_id, message.metadata.message_type
        self.asked.append((node, question))
        message.metadata.__dict__["_message_id"] = f"message-{len(self.asked)}"
        if self.answers.get((node, question)) is not SILENT:
            self.waiting[message.metadata.message_id] = self.answer(message, node, question)
        return message.metadata.message_id

    def push_messages(self, messages):
        return [self.deliver(message) for message in messages]

    def pull_messages(self, message_ids):
        return [self.waiting.pop(key) for key in message_ids if key in self.waiting]

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(messages))


@pytest.fixture
def naps(monkeypatch):
    naps, now = [], [0.0]
    monkeypatch.setattr("conclave.server.roster.time.monotonic", lambda: now[0])
    monkeypatch.setattr("conclave.server.roster.time.sleep", lambda s: (naps.append(s), now.__setitem__(0, now[0] + s)))
    return naps


@pytest.fixture
def net(naps):
    be_the_server()
    return Net({11: describe(1), 12: describe(2)})


def started(net):
    roster = Roster(net, read_scenario(find("digits"), {"partition.nodes": 2}), PLAN, "1")
    roster.describe()
    roster.admit()
    roster.refresh()
    net.asked.clear()
    net.looks = 0
    return roster


def ids(roster):
    return {description.fingerprint: node for node, description in roster.members().items()}


NAME = {number: describe(number).fingerprint for number in range(1, 6)}


def test_where_nothing_changed_one_look_is_all(net, naps):
    roster = started(net)
    assert [roster.refresh() for _ in range(5)] == [False] * 5
    assert (net.looks, net.asked, naps) == (5, [], [])


def test_who_refuses_before_the_first_round_is_counted_by_code(net):
    net.here |= {13: describe(3), 14: describe(4)}
    net.answers = {
        (12, QUERY_DESCRIBE): encode(Refusal(code="version-mismatch")),
        (13, QUERY_ADMIT): encode(Refusal(code="paused")),
        (14, QUERY_ADMIT): encode(Refusal(code="paused")),
    }
    roster = started(net)
    assert roster.refused == {"version-mismatch": 1, "paused": 2}
    assert counted(roster.refused) == "2 × paused, 1 × version-mismatch"


def test_a_late_node_is_described_admitted_and_takes_part_at_once(net, naps):
    roster = started(net)
    net.here[13] = describe(3)
    assert roster.refresh()
    assert net.asked == [(13, QUERY_DESCRIBE), (13, QUERY_ADMIT)]
    assert ids(roster) == {NAME[1]: 11, NAME[2]: 12, NAME[3]: 13}
    assert naps == []
    assert not roster.refresh()


@pytest.mark.parametrize("question", [QUERY_DESCRIBE, QUERY_ADMIT])
@pytest.mark.parametrize(
    "answer", [encode(Refusal(code="budget-exhausted")), Error(code=0, reason="crash"), encode(describe(2))]
)
def test_a_newcomer_that_refuses_or_lies_changes_nothing_until_it_comes_again(net, question, answer):
    roster = started(net)
    net.here[13] = describe(3)
    net.answers[13, question] = answer
    roster.refresh()
    assert ids(roster) == {NAME[1]: 11, NAME[2]: 12}
    asked = list(net.asked)
    roster.refresh()
    assert net.asked == asked  # it is not asked again
    del net.here[13]
    roster.refresh()
    net.here[13], net.answers = describe(3), {}
    roster.refresh()
    assert ids(roster) == {NAME[1]: 11, NAME[2]: 12, NAME[3]: 13}


@pytest.mark.parametrize("code", ["awaiting-approval", "paused"])
def test_a_node_whose_owner_decides_during_the_run_joins_it(net, naps, code):
    """It is asked before each round, without waiting; once it admits the plan, nobody asks any more."""
    net.answers = {(12, QUERY_ADMIT): encode(Refusal(code=code))}
    roster = started(net)
    for _ in range(3):
        roster.refresh()
        assert net.asked == [(12, QUERY_ADMIT)]
        assert ids(roster) == {NAME[1]: 11}
        net.asked.clear()
    net.answers.clear()
    roster.refresh()  # takes the last refusal, and asks once more
    assert roster.refresh()
    assert ids(roster) == {NAME[1]: 11, NAME[2]: 12}
    net.asked.clear()
    assert [roster.refresh() for _ in range(3)] == [False] * 3
    assert (net.asked, naps) == ([], [])


def test_other_refusals_are_final_while_the_node_stays(net, naps):
    net.answers = {(12, QUERY_ADMIT): encode(Refusal(code="budget-exhausted"))}
    roster = started(net)
    assert [roster.refresh() for _ in range(3)] == [False] * 3
    assert (net.asked, naps) == ([], [])


@pytest.mark.parametrize("question", [QUERY_DESCRIBE, QUERY_ADMIT])
def test_a_silent_newcomer_is_waited_for_once_and_may_answer_later(net, naps, question):
    roster = started(net)
    net.here[13] = describe(3)
    net.answers[13, question] = SILENT
    roster.refresh()
    assert sum(naps) == pytest.approx(10.0, abs=0.11)
    naps.clear()
    for _ in range(3):
        roster.refresh()
    assert naps == []
    assert ids(roster) == {NAME[1]: 11, NAME[2]: 12}
    assert net.asked.count((13, question)) == 1
    late = next(f"message-{n}" for n, entry in enumerate(net.asked, start=1) if entry == (13, question))
    net.answers.clear()
    net.waiting[late] = net.answer(message_to(13, question, late), 13, question)
    roster.refresh()
    assert ids(roster) == {NAME[1]: 11, NAME[2]: 12, NAME[3]: 13}


@pytest.mark.parametrize("question", [QUERY_DESCRIBE, QUERY_ADMIT])
def test_a_node_that_was_silent_before_round_one_is_asked_again(net, question):
    net.answers[12, question] = SILENT
    roster = Roster(net, read_scenario(find("digits"), {"partition.nodes": 2}), PLAN, "1")
    roster.describe()
    roster.admit()
    assert ids(roster) == {NAME[1]: 11}
    net.answers.clear()
    roster.refresh()
    assert ids(roster) == {NAME[1]: 11, NAME[2]: 12}


def test_a_node_that_is_gone_is_skipped_and_is_itself_when_it_returns(net):
    roster = started(net)
    del net.here[12]
    assert roster.refresh()
    assert ids(roster) == {NAME[1]: 11}
    net.here[12] = describe(2, declared_size=5)  # it may say something else about itself by now
    roster.refresh()
    assert ids(roster) == {NAME[1]: 11, NAME[2]: 12}
    assert roster.members()[12].declared_size == 5
    assert net.asked == [(12, QUERY_DESCRIBE)]  # its budget is set aside already


def test_a_node_that_returns_under_another_id_is_the_same_node(net):
    roster = started(net)
    del net.here[12]
    net.here[57] = describe(2)
    roster.refresh()
    assert ids(roster) == {NAME[1]: 11, NAME[2]: 57}
    assert (57, QUERY_ADMIT) not in net.asked


def test_while_the_old_id_is_listed_it_has_the_key_and_the_new_one_follows(net):
    roster = started(net)
    net.here[57] = describe(2)
    roster.refresh()
    assert ids(roster) == {NAME[1]: 11, NAME[2]: 12}
    del net.here[12]  # Flower notices a death after a minute
    roster.refresh()
    assert ids(roster) == {NAME[1]: 11, NAME[2]: 57}
    net.here[12] = describe(2)  # and if it was an impostor that jumped in, the first comes first again
    roster.refresh()
    assert ids(roster) == {NAME[1]: 11, NAME[2]: 12}


def test_an_id_may_come_to_be_another_node(net):
    roster = started(net)
    del net.here[12]
    roster.refresh()
    net.here[12] = describe(4)
    roster.refresh()
    assert ids(roster) == {NAME[1]: 11, NAME[4]: 12}


def test_everyone_gone_is_no_error_and_close_tells_who_is_there(net):
    roster = started(net)
    kept = dict(net.here)
    net.here.clear()
    roster.refresh()
    assert roster.members() == {}
    net.here.update(kept)
    roster.refresh()
    del net.here[11]
    roster.refresh()
    net.asked.clear()
    roster.close()
    assert net.asked == [(12, QUERY_CLOSE)]


def test_an_answer_to_another_nodes_question_is_no_answer(net):
    """Message ids are not secret: a reply counts only from the node that was asked."""
    roster = started(net)
    net.here[13] = describe(3)
    net.answers[13, QUERY_DESCRIBE] = SILENT
    roster.refresh()
    question = next(n for n, entry in enumerate(net.asked, start=1) if entry == (13, QUERY_DESCRIBE))
    forged = reply_with(message_to(11, QUERY_DESCRIBE, f"message-{question}"), encode(describe(3)))
    net.waiting[f"message-{question}"] = forged
    roster.refresh()
    assert ids(roster) == {NAME[1]: 11, NAME[2]: 12}


def test_before_round_one_nobody_is_a_failed_run(net):
    net.answers = {(n, QUERY_ADMIT): encode(Refusal(code="not-allowed")) for n in (11, 12)}
    roster = Roster(net, read_scenario(find("digits"), {"partition.nodes": 2}), PLAN, "1")
    roster.describe()
    with pytest.raises(RunFailedError, match="no node admits the plan"):
        roster.admit()
