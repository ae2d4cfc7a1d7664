"""A small federation for the server's tests: plan, strategy, nodes, and replies made by hand."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping

import torch
from conftest import make_config
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from conclave.model import parameters
from conclave.model.building import build
from conclave.privacy.ledger import SignedHead
from conclave.privacy.ledger.heads import public_hex
from conclave.protocol.codec import body_of, decode, encode, unpack
from conclave.protocol.messages import Description, TrainReply, TrainRequest
from conclave.protocol.plan import Plan
from conclave.protocol.tensor_array import pack
from conclave.server.aggregate.aggregation import Averager, WeightedDelta
from conclave.server.config import FederationConfig
from conclave.server.strategy import ExpertStrategy

_ids: Iterator[int] = itertools.count()


def be_the_server() -> None:
    """Flower wants to know who makes a message, as in ``simulations/engines/inline.py``."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SUPERLINK_NODE_ID, 0


def make_plan(**changes) -> Plan:
    document = {
        "model": make_config(),
        "privacy": {"epsilon": 8.0, "delta": 1e-5, "clip": 1.5, "sampling_rate": 0.5},
        "training": {"learning_rate": 0.5, "steps": 3},
        "rounds": 10,
        "noise_multiplier": 2.0,
    }
    return Plan.model_validate(document | changes)


def key_of(number: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)


def describe(number: int, **changes) -> Description:
    document = {"public_key": public_hex(key_of(number)), "declared_size": 100 * number, "expert_capacity": 6}
    return Description.model_validate(document | changes)


def make_strategy(nodes: int = 4, plan: Plan | None = None, seed: int = 1, **federation) -> ExpertStrategy:
    be_the_server()
    plan = plan or make_plan()
    network = build(plan.model, 1)
    return ExpertStrategy(
        plan=plan,
        config=FederationConfig.model_validate({"rounds": plan.rounds, "experts_per_node": 3} | federation),
        seed=seed,
        run_id="1",
        nodes={10 + number: describe(number) for number in range(1, nodes + 1)},
        tensors=parameters.split(network.state_dict(), network.held),
        scenario="test",
    )


def ask(strategy: ExpertStrategy, round_number: int = 1) -> list[Message]:
    requests = strategy.configure_train(round_number, ArrayRecord(), ConfigRecord(), None)
    for request in requests:
        request.metadata.__dict__["_message_id"] = f"request-{next(_ids)}"
    return requests


def held_of(request: Message):
    return decode(request.content, TrainRequest).held


def received(request: Message, strategy: ExpertStrategy) -> dict[str, Tensor]:
    return unpack(body_of(request.content), parameters.shapes(strategy.plan.model, held_of(request)))


def delta_for(request: Message, strategy: ExpertStrategy, value: float = 0.001) -> dict[str, Tensor]:
    shapes = parameters.shapes(strategy.plan.model, held_of(request))
    return {name: torch.full(shape, value) for name, shape in shapes.items()}


def reply_with(request: Message, content) -> Message:
    """A reply to a request; ``content`` is a RecordDict or a Flower Error."""
    reply = Message(content, reply_to=request)
    reply.metadata.__dict__["_message_id"] = f"reply-{next(_ids)}"
    return reply


def receipt_for(request: Message) -> SignedHead:
    """A receipt of the node that a request goes to, further than any before."""
    number = request.metadata.dst_node_id - 10
    seq = next(_ids) + 1
    return SignedHead.sign(key_of(number), describe(number).ledger_id, seq, f"{seq:064x}")


def charge_id_of(request: Message) -> str:
    """The charge for a request, as rule 9 of docs/privacy.md defines it: the hash of a canonical JSON array."""
    document = decode(request.content, TrainRequest)
    held = {str(layer): list(ids) for layer, ids in sorted(document.held.items())}
    text = json.dumps({"held": held}, separators=(",", ":"))
    model_in = hashlib.sha256(text.encode() + body_of(request.content)).hexdigest()
    ledger = describe(request.metadata.dst_node_id - 10).ledger_id
    parts = [document.run_id, document.round, ledger, document.plan.hash, model_in, "train"]
    return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()


def reply_to(request: Message, receipt: SignedHead | None = None) -> TrainReply:
    """The document of an honest reply."""
    return TrainReply(charge_id=charge_id_of(request), receipt=receipt or receipt_for(request))


def train_reply(request: Message, delta: Mapping[str, Tensor], receipt: SignedHead | None = None) -> Message:
    return reply_with(request, encode(reply_to(request, receipt), pack(delta)))


def document(text: str, body: bytes | None = None) -> RecordDict:
    content = encode(describe(1), body)
    content["document"] = ConfigRecord({"json": text})
    return content


def average(contributions: Iterable[WeightedDelta], min_holders: int) -> dict[str, Tensor]:
    """Average contributions that come in the given order, expected in the order of their nodes' names."""
    contributions = list(contributions)
    averager = Averager(sorted(item.node for item in contributions))
    for item in contributions:
        averager.add(item.node, item)
    return averager.result(min_holders)
