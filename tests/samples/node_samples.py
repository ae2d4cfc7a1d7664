"""A node with a few records, and what it is sent."""

from __future__ import annotations

import pytest
from conftest import make_batch, make_config
from ledger_samples import new_ledger

from conclave.clients.node import Node
from conclave.clients.policy import Policy
from conclave.data.values.schema import ImageSchema
from conclave.model import parameters
from conclave.model.building import build
from conclave.privacy.randomness import derive
from conclave.protocol.codec import body_of, decode, encode
from conclave.protocol.messages import ProtocolError, TrainReply
from conclave.protocol.tensor_array import pack

HELD = {0: (1, 3, 4)}


def make_node(folder, epsilon=8.0, witness=None, **policy) -> Node:
    policy = {"simulation": True} | policy
    return Node(
        records=make_batch(40),
        schema=ImageSchema(image=(1, 8, 8), classes=5),
        declared_size=40,
        policy=Policy(**policy),
        ledger=new_ledger(folder, epsilon=epsilon, witness=witness),
        new_secret=lambda charge_id: derive(bytes(32), charge_id),
    )


def body(held=HELD, config=None) -> bytes:
    network = build(config or make_config(), seed=1)
    wire = parameters.split(network.state_dict(), network.held)
    return pack({name: wire[name] for name in parameters.select(wire, held)})


def train(node: Node, asked, sent: bytes) -> tuple[TrainReply, bytes]:
    content = node.train(asked, encode(asked, sent))
    return decode(content, TrainReply), body_of(content)


def code_of(node: Node, asked, sent: bytes) -> str:
    before = len(node.ledger.entries())
    with pytest.raises(ProtocolError) as caught:
        train(node, asked, sent)
    assert len(node.ledger.entries()) == before, "a refusal must cost nothing"
    return caught.value.code
