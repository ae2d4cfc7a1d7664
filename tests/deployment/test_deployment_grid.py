"""What comes over Flower, at a server and at a node: the bytes of others, perhaps no message, perhaps never whole."""

from __future__ import annotations

import json
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import context_to_proto, message_to_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.run_pb2 import Run
from flwr.supercore.inflatable.inflatable_object import (
    add_header_to_object_body,
    get_all_nested_objects,
    get_object_tree,
)
from flwr.supercore.task_identity import TaskIdentity

from conclave.deployment.flower import runtime as flower_runtime
from conclave.deployment.flower.grid import QuickGrid
from conclave.deployment.flower.runtime import RuntimeApi, answer_message
from conclave.deployment.flower.supernode import PATIENCE_S

RUN = 5


def request_to(node: int) -> Message:
    message = Message(RecordDict({"document": ConfigRecord({"json": "?"})}), dst_node_id=node, message_type="train")
    message.metadata.__dict__["_message_id"] = f"request to {node}"
    return message


def reply_of(node: int, content: RecordDict | None = None) -> Message:
    content = RecordDict({"document": ConfigRecord({"json": f"of {node}"})}) if content is None else content
    return Message(content, reply_to=request_to(node))


class Link:
    """What a SuperLink or a SuperNode hands out: messages, and their parts."""

    def __init__(self) -> None:
        self.announced: list[tuple[object, ObjectTree]] = []
        self.parts: dict[str, bytes] = {}
        self.pulled: list[str] = []
        self.confirmed: list[str] = []
        self.given: set[str] = set()

    def send(self, message: Message, *, parts: dict[str, bytes] | None = None, known: Message | None = None) -> None:
        """Announce a message. parts: what is uploaded, all of it if not given. known: what the announcement says."""
        message.metadata.__dict__["_message_id"] = message.object_id
        nested = {key: item.deflate() for key, item in get_all_nested_objects(message).items()}
        self.parts |= nested if parts is None else parts
        known = known or message
        known.metadata.__dict__["_message_id"] = message.object_id
        self.announced.append((message_to_proto(remove_content_from_message(known)), get_object_tree(message)))

    def PullMessages(self, request):  # noqa: N802
        """Hand a message out once. Who asks again is told that it is lost, as by Flower."""
        assert not self.given & set(request.message_ids)
        given, self.announced = self.announced, []
        self.given |= {message.metadata.reply_to_message_id for message, _ in given} - {""}
        return SimpleNamespace(messages_list=[m for m, _ in given], message_object_trees=[t for _, t in given])

    def PullObject(self, request):  # noqa: N802
        self.pulled.append(request.object_id)
        content = self.parts.get(request.object_id)
        return SimpleNamespace(object_found=True, object_available=content is not None, object_content=content)

    def ConfirmMessageReceived(self, request):  # noqa: N802
        self.confirmed.append(request.message_object_id)


@pytest.fixture(autouse=True)
def task(monkeypatch):
    """Messages are made in the name of a task."""
    for name, value in {"_task_id": 1, "_run_id": RUN, "_node_id": SUPERLINK_NODE_ID}.items():
        monkeypatch.setattr(TaskIdentity, name, value)


@pytest.fixture
def link():
    return Link()


@pytest.fixture
def grid(link, monkeypatch):
    monkeypatch.setattr(QuickGrid, "_runtime_client", link)
    return QuickGrid(RuntimeApi("localhost:1", b""), "token")


ASKED = [f"request to {node}" for node in (7, 8)]


def said(replies) -> dict[int, str]:
    return {reply.metadata.src_node_id: reply.content["document"]["json"] for reply in replies}


def test_whole_replies_come_as_they_were_sent(grid, link):
    for node in (7, 8):
        link.send(reply_of(node))
    replies = grid.pull_messages(ASKED)
    assert said(replies) == {7: "of 7", 8: "of 8"}
    assert [reply.metadata.reply_to_message_id for reply in replies] == ASKED
    assert [reply.metadata.message_id for reply in replies] == link.confirmed
    assert grid.pull_messages([]) == []


def test_who_announces_a_reply_and_keeps_a_part_back_holds_up_nobody(grid, link, monkeypatch, caplog):
    """Flower's own grid waits for it, for up to two hours, and takes no other reply meanwhile."""
    now = [100.0]
    monkeypatch.setattr("conclave.deployment.flower.grid.time.monotonic", lambda: now[0])
    slow, parts = reply_of(7), {}
    for key, item in get_all_nested_objects(slow).items():
        parts[key] = item.deflate()
    last = parts.pop(slow.object_id)
    link.send(slow, parts=parts)
    link.send(reply_of(8))
    assert said(grid.pull_messages(ASKED)) == {8: "of 8"}
    once = len(link.pulled)
    now[0] += PATIENCE_S - 1.0
    assert grid.pull_messages(ASKED[:1]) == []
    assert set(link.pulled[once:]) == {slow.object_id}  # what is here is not fetched again
    link.parts[slow.object_id] = last
    assert said(grid.pull_messages(ASKED[:1])) == {7: "of 7"}
    link.parts.clear()
    link.given.clear()
    link.send(reply_of(7), parts={})
    assert grid.pull_messages(ASKED[:1]) == []
    now[0] += PATIENCE_S + 1.0
    (gone,) = grid.pull_messages(ASKED[:1])
    assert (gone.metadata.src_node_id, gone.metadata.reply_to_message_id) == (SUPERLINK_NODE_ID, ASKED[0])
    assert gone.has_error()
    assert "node 7: its reply is dropped, it did not come whole" in caplog.text


def with_garbage(head: str):
    """Return a record whose bytes begin as an object of the kind ``head`` does, and go on with nonsense."""

    class Evil(ConfigRecord):
        def deflate(self):
            return add_header_to_object_body(object_body=b"\xff\xff\xff\xff", obj=self)

    Evil.__qualname__ = Evil.__name__ = head
    return Evil({"json": "x"})


@pytest.mark.parametrize("head", ["ConfigRecord", "ArrayRecord", "Message", "Unknown"])
def test_what_is_no_message_is_dropped_and_the_others_count(grid, link, caplog, head):
    """Flower's own grid raises, which ends the run for everybody."""
    link.send(reply_of(7, RecordDict({"document": with_garbage(head)})))
    link.send(reply_of(8))
    gone, other = grid.pull_messages(ASKED)
    assert gone.metadata.src_node_id == SUPERLINK_NODE_ID
    assert said([other]) == {8: "of 8"}
    assert "node 7: its reply is dropped, it is no message" in caplog.text
    assert len(link.confirmed) == 2  # so that the SuperLink forgets its parts


def test_another_object_in_place_of_a_message_is_dropped(grid, link):
    record, known = RecordDict({"document": ConfigRecord({"json": "x"})}), reply_of(7)
    link.parts |= {key: item.deflate() for key, item in get_all_nested_objects(record).items()}
    link.announced.append((message_to_proto(remove_content_from_message(known)), get_object_tree(record)))
    (gone,) = grid.pull_messages(ASKED)
    assert gone.metadata.src_node_id == SUPERLINK_NODE_ID


@pytest.mark.parametrize(
    ("field", "value"),
    [("_src_node_id", 8), ("_reply_to_message_id", ASKED[1]), ("_run_id", 6), ("_message_type", "query.describe")],
)
def test_a_message_that_says_it_is_another_nodes_is_dropped(grid, link, field, value):
    """The SuperLink checks what announces a message. Who believes the message itself lets one node speak for others."""
    spoofed, known = reply_of(7), reply_of(7)
    spoofed.metadata.__dict__[field] = value
    link.send(spoofed, known=known)
    (gone,) = grid.pull_messages(ASKED)
    assert (gone.metadata.src_node_id, gone.metadata.reply_to_message_id) == (SUPERLINK_NODE_ID, ASKED[0])


def test_a_run_that_is_over_ends_the_looking(grid, link, monkeypatch):
    def over(_):
        raise httpx.HTTPStatusError("over", request=None, response=httpx.Response(401))

    link.send(reply_of(7))
    monkeypatch.setattr(link, "PullObject", over)
    with pytest.raises(httpx.HTTPStatusError):
        grid.pull_messages(ASKED)


# A node.


@pytest.fixture
def answered(link, monkeypatch):
    """Let a node answer the message that the link has; return its answer."""

    def answer(app=None) -> Message | None:
        sent = []
        context = Context(RUN, 7, {}, RecordDict(), {})
        link.PullTaskInput = lambda _: SimpleNamespace(
            task_id=1,
            run=Run(run_id=RUN),
            context=context_to_proto(context),
        )
        link.PushTaskOutput = lambda _: None
        link.SendTaskHeartbeat = lambda _: SimpleNamespace(success=True)

        @contextmanager
        def client(*interceptors, component):
            yield link

        monkeypatch.setattr(flower_runtime, "push_message", lambda client, reply, context: sent.append(reply))
        app = app or (lambda message, context: Message(message.content, reply_to=message))
        answer_message(app, SimpleNamespace(client=client), "token", lambda *_: None, lambda *_: None)
        return sent[0] if sent else None

    return answer


def code_of(reply: Message) -> str:
    return json.loads(reply.content["document"]["json"])["code"]


def test_a_node_answers_a_message(link, answered):
    link.send(request_to(7))
    reply = answered()
    assert reply.content["document"]["json"] == "?"
    assert reply.metadata.dst_node_id == SUPERLINK_NODE_ID


def test_a_node_answers_what_is_no_message_with_a_code_and_takes_the_next(link, answered):
    """Unanswered, its SuperNode would wait for an answer for the rest of the run."""
    evil = request_to(7)
    evil.content["document"] = with_garbage("ConfigRecord")
    link.send(evil)
    reply = answered()
    assert code_of(reply) == "bad-request"
    assert reply.metadata.reply_to_message_id == evil.object_id
    link.send(request_to(7))
    assert answered().content["document"]["json"] == "?"


def test_what_the_app_raises_stays_with_the_node(link, answered, caplog):
    def broken(message, context):
        raise RuntimeError("the record of Mr Smith")

    link.send(request_to(7))
    assert code_of(answered(broken)) == "internal-error"
    assert "Mr Smith" in caplog.text
