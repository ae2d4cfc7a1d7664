"""Frames between the pool and its workers: what is sent arrives, alone or together, and nothing is lost silently."""

from __future__ import annotations

import socket
import threading

import pytest
import torch
from conftest import make_reply
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from conclave.protocol.codec import decode, encode, tensors_of
from conclave.protocol.messages import TrainReply
from conclave.simulations.engines.frames import Channel, Frame, content_of, document_of


@pytest.fixture
def channels():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours), Channel(theirs)


FRAMES = [
    Frame({"number": 3, "type": "train", "created_at": 1.1, "freed": [0, 4096], "broadcast": None}, '{"a": "é\\n"}'),
    Frame({}, None),
    Frame({"sent": 1}, ""),
]


def test_frames_arrive_one_by_one_and_together(channels):
    ours, theirs = channels
    for frame in FRAMES:
        ours.send(frame)
        assert theirs.receive() == frame
    assert not theirs.ready
    ours.send(*FRAMES)
    assert theirs.ready
    assert theirs.receive() == FRAMES[0]
    assert theirs.ready  # what has left the socket counts too
    assert theirs.receive_all() == FRAMES[1:]
    assert not theirs.ready
    ours.connection.close()
    assert theirs.receive() is None
    assert theirs.receive_all() == []


def test_a_long_document_arrives_in_pieces(channels):
    ours, theirs = channels
    frames = [Frame({"sent": 1}, "x" * 1_000_000), Frame({"sent": 2}, "y" * 30_000)]
    sender = threading.Thread(target=ours.send, args=frames)
    sender.start()
    got = theirs.receive_all()
    while len(got) < 2:
        got += theirs.receive_all()
    sender.join()
    assert got == frames


@pytest.mark.parametrize("part", [b"\x00", b"\x00\x00\x00\x09\xff\xff\xff\xff{"])
def test_a_message_cut_short_is_an_error(channels, part):
    ours, theirs = channels
    ours.connection.sendall(part)
    ours.connection.close()
    with pytest.raises(ConnectionError):
        theirs.receive()


def test_content_is_taken_apart_and_put_together():
    tensors = {"shared/a": torch.randn(3, 5)}
    content = encode(make_reply(7), tensors)
    again = content_of(document_of(content), tensors)
    assert decode(again, TrainReply) == make_reply(7)
    assert torch.equal(tensors_of(again, {"shared/a": torch.Size([3, 5])})["shared/a"], tensors["shared/a"])
    assert content_of(document_of(RecordDict()), None) == RecordDict()
    assert content_of("x", content["tensors"])["tensors"] is content["tensors"]


@pytest.mark.parametrize(
    "content",
    [
        {"document": ConfigRecord({"json": "{}"}), "more": MetricRecord({"x": 1.5})},
        {"more": ConfigRecord({"json": "{}"})},
        {"document": ConfigRecord({"json": "{}", "more": 1})},
        {"document": ConfigRecord({"json": 1})},
        {"document": MetricRecord({"json": 1})},
    ],
)
def test_what_a_frame_cannot_carry_is_refused(content):
    with pytest.raises(ValueError, match="worker processes carry"):
        document_of(RecordDict(content))
