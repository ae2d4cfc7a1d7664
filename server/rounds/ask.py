"""What nodes are asked in a round: to each node its part of the model, encoded once for all with the same part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import ArrayRecord, Message
from torch import Tensor

from conclave.model.experts.config import HeldExperts
from conclave.privacy.ledger import SignedHead
from conclave.protocol.codec import encode, encode_tensors
from conclave.protocol.encodings import encodings_of, wire_form
from conclave.protocol.messages import EVALUATE, TRAIN, EvaluateRequest, TrainReply, TrainRequest
from conclave.protocol.plan import Plan
from conclave.server.replies.receipts import EMPTY_RECEIPT
from conclave.server.replies.validation import Asked
from conclave.server.rounds.assign import Assignment, assign_to
from conclave.server.rounds.terms import Books, Nodes, Terms
from conclave.server.rounds.traffic import exchange_bytes


@dataclass(frozen=True)
class Requests:
    """Requests of one kind (``TRAIN`` or ``EVALUATE``) and round.

    asked: Flower node id → what the node is asked; its answer is compared with it.
    """

    kind: str
    number: int
    asked: Mapping[int, Asked]

    def messages(self) -> list[Message]:
        """Return Flower's messages."""
        return [
            Message(asked.content, node, self.kind, group_id=str(self.number)) for node, asked in self.asked.items()
        ]

    def bytes_down(self) -> int:
        """Return what they weigh on the wire, all together."""
        return sum(exchange_bytes(asked.content) for asked in self.asked.values())


def ask_to_train(
    terms: Terms, books: Books, nodes: Nodes, assignment: Assignment, model: Mapping[str, Tensor], number: int
) -> Requests:
    """Return a round's requests: to each node of the cohort, its experts, their router rows and the shared weights.

    Args:
        model: wire name → float32, what nodes go on from.
    """
    at = {node.fingerprint: flower_id for flower_id, node in nodes.items()}
    parts, asked = _Parts(terms.plan, model), {}
    for name, held in assignment.items():
        request = _train_request(terms, number, held, books.receipts.latest(name))
        asked[at[name]] = Asked(nodes[at[name]], request, encode(request, parts.of(held)))
    return Requests(TRAIN, number, asked)


def ask_to_evaluate(terms: Terms, books: Books, nodes: Nodes, model: Mapping[str, Tensor], number: int) -> Requests:
    """Return the requests to measure a model on held-out units, where the plan has that after this round.

    All nodes that hold units out are asked, also those that the round left out.

    Args:
        model: wire name → float32, what is published after the round.
    """
    evaluation = terms.plan.evaluation
    if evaluation is None or not evaluation.due(number, terms.plan.rounds):
        return Requests(EVALUATE, number, {})
    evaluating = {flower_id: node for flower_id, node in nodes.items() if node.held_out is not None}
    assignment = assign_to([node.fingerprint for node in evaluating.values()], terms, books, nodes, number)
    parts, asked = _Parts(terms.plan, model), {}
    for flower_id, node in evaluating.items():
        fits = node.expert_capacity >= terms.plan.model.experts.routed
        every = evaluation.experts == "all" and fits
        request = EvaluateRequest(
            run_id=terms.run_id,
            scenario=terms.scenario,
            round=number,
            plan=terms.plan,
            held=terms.plan.model.all_experts if every else assignment[node.fingerprint],
            receipt=None if node.held_out is None else books.receipts.latest(node.held_out.fingerprint),
        )
        asked[flower_id] = Asked(node, request, encode(request, parts.of(request.held)))
    return Requests(EVALUATE, number, asked)


def full_exchange_bytes(terms: Terms, model: Mapping[str, Tensor]) -> int:
    """Return the bytes of one exchange (request and reply) with the whole model.

    Args:
        model: wire name → float32, all of it.
    """
    plan = terms.plan
    request = encode(_train_request(terms, 1, plan.model.all_experts, EMPTY_RECEIPT), _packed(plan, model))
    shapes = {name: tensor.shape for name, tensor in model.items()}
    delta = wire_form(shapes, encodings_of(plan.traffic.delta, shapes)).encode(model, bytes(32))
    reply = encode(TrainReply(charge_id="0" * 64, receipt=EMPTY_RECEIPT), delta)
    return exchange_bytes(request) + exchange_bytes(reply)


class _Parts:
    """What travels of one model: nodes with equal experts share the tensors, encoded once."""

    def __init__(self, plan: Plan, model: Mapping[str, Tensor]) -> None:
        self._plan, self._model = plan, model
        self._encoded: dict[str, ArrayRecord] = {}

    def of(self, held: HeldExperts) -> ArrayRecord:
        """Return the part of a holder of ``held``."""
        if str(held) not in self._encoded:
            part = {name: self._model[name] for name in self._plan.travelling(held)}
            self._encoded[str(held)] = _packed(self._plan, part)
        return self._encoded[str(held)]


def _packed(plan: Plan, tensors: Mapping[str, Tensor]) -> ArrayRecord:
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    # To nearest: nodes with equal experts get equal weights, and nothing adds up, for the server keeps its own.
    return encode_tensors(wire_form(shapes, encodings_of(plan.traffic.model, shapes)).encode(tensors, None))


def _train_request(terms: Terms, number: int, held: HeldExperts, receipt: SignedHead | None) -> TrainRequest:
    return TrainRequest(
        run_id=terms.run_id, scenario=terms.scenario, round=number, plan=terms.plan, held=held, receipt=receipt
    )
