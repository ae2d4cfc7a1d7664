"""A small federation for the server's tests: plan, rounds, nodes, and replies made by hand."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from conftest import make_config
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from conclave.model import parameters
from conclave.model.building import build
from conclave.privacy.ledger import SignedHead
from conclave.privacy.ledger.heads import public_hex
from conclave.protocol.codec import body_of, decode, encode, unpack
from conclave.protocol.encodings import encodings_of, wire_form
from conclave.protocol.messages import EVALUATE, QUERY_CHOOSE, TRAIN, Description, TrainReply, TrainRequest
from conclave.protocol.plan import Plan
from conclave.protocol.tensor_array import pack
from conclave.server.aggregate.aggregation import Averager, WeightedDelta
from conclave.server.aggregate.balancing import BalancingConfig
from conclave.server.node_level.rounds import NodeLevelRounds
from conclave.server.replies.receipts import ReceiptBook
from conclave.server.rounds.ask import Requests, ask_to_evaluate, ask_to_train
from conclave.server.rounds.assign import assign_round
from conclave.server.rounds.config import FederationConfig
from conclave.server.rounds.model_state import ModelState
from conclave.server.rounds.outcome import RoundOutcome
from conclave.server.rounds.round import Rounds
from conclave.server.rounds.terms import Books, Nodes, Terms

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


NO_PRIVACY = make_plan(
    noise_multiplier=None,
    privacy={"mechanism": "none", "epsilon": 8.0, "delta": 1e-5, "clip": 1.0, "sampling_rate": 0.5},
)


def key_of(number: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)


def describe(number: int, **changes) -> Description:
    document = {"public_key": public_hex(key_of(number)), "declared_size": 100 * number, "expert_capacity": 6}
    return Description.model_validate(document | changes)


Answers = Callable[[list[Message]], Iterable[Message]]


class SmallFederation:
    """Four nodes, or as many as asked for, whose replies a test makes by hand; it is the Grid that delivers them."""

    def __init__(
        self,
        nodes: int = 4,
        plan: Plan | None = None,
        seed: int = 1,
        *,
        balancing: BalancingConfig | None = None,
        node_level: NodeLevelRounds | None = None,
        **config,
    ) -> None:
        """``config``: keys of ``[federation]``. Node n has the Flower id 10 + n."""
        be_the_server()
        self.plan = plan or make_plan()
        federation = FederationConfig.model_validate({"rounds": self.plan.rounds, "experts_per_node": 3} | config)
        self.terms = Terms("1", "test", seed, self.plan, federation, balancing)
        self.nodes: Nodes = {10 + number: describe(number) for number in range(1, nodes + 1)}
        network = build(self.plan.model, 1)
        self.model = ModelState(self.terms, parameters.split(network.state_dict(), network.held))
        self.books = Books(ReceiptBook(), None, node_level)
        self.sent: list[str] = []
        """What kind of question went out at every turn."""
        self._answers: dict[str, Answers] = {}

    def values(self) -> dict[str, Tensor]:
        """A copy of the global model."""
        return {name: tensor.clone() for name, tensor in self.model.tensors.items()}

    def requests(self, number: int = 1) -> Requests:
        """What a round asks of nodes."""
        assignment = assign_round(self.terms, self.books, self.nodes, number)
        return ask_to_train(self.terms, self.books, self.nodes, assignment, self.model.tensors, number)

    def evaluation_requests(self, number: int) -> Requests:
        """What nodes are asked to measure after a round."""
        return ask_to_evaluate(self.terms, self.books, self.nodes, self.model.published, number)

    def round(
        self, number: int, train: Answers, evaluate: Answers = lambda _: (), choose: Answers = lambda _: ()
    ) -> RoundOutcome:
        """Carry out a round; ``train``, ``evaluate`` and ``choose`` make the replies to what is asked."""
        self._answers = {QUERY_CHOOSE: choose, TRAIN: train, EVALUATE: evaluate}
        return Rounds(self, self.terms, self.model, self.books).go(number, self.nodes)

    def answer(self, number: int, replies: Iterable[Message]) -> RoundOutcome:
        """Carry out a round with replies that were made to what :func:`ask` returned."""
        return self.round(number, lambda _: replies)

    def send_and_receive(self, messages: list[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """As Flower's Grid."""
        kind = _named(messages)[0].metadata.message_type if messages else TRAIN
        self.sent.append(kind)
        return self._answers[kind](messages)


def ask(federation: SmallFederation, number: int = 1) -> list[Message]:
    return _named(federation.requests(number).messages())


def _named(messages: list[Message]) -> list[Message]:
    for message in messages:
        message.metadata.__dict__["_message_id"] = f"request-{next(_ids)}"
    return messages


def held_of(request: Message):
    return decode(request.content, TrainRequest).held


def received(request: Message, federation: SmallFederation) -> dict[str, Tensor]:
    return unpack(body_of(request.content), parameters.shapes(federation.plan.model, held_of(request)))


def delta_for(request: Message, federation: SmallFederation, value: float = 0.001) -> dict[str, Tensor]:
    shapes = parameters.shapes(federation.plan.model, held_of(request))
    return {name: torch.full(shape, value) for name, shape in shapes.items()}


def encoded(request: Message, delta: Mapping[str, Tensor], federation: SmallFederation) -> bytes | Mapping[str, Tensor]:
    """A delta as the federation's plan lets it travel."""
    shapes = parameters.shapes(federation.plan.model, held_of(request))
    return wire_form(shapes, encodings_of(federation.plan.traffic.delta, shapes)).encode(delta, bytes(32))


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
