"""A node: private records, the owner's policy and the ledger, behind two plain functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from flwr.app import RecordDict

from clients.policy import Policy
from clients.protocol import (
    Description,
    Plan,
    ProtocolError,
    TrainReply,
    TrainRequest,
    body_of,
    encode,
    tensors_of,
)
from clients.trainer import train
from data.schema import Schema
from data.sources import GROUP, Records
from model import HeldExperts, parameters
from privacy.accounting import SampledGaussian
from privacy.canonical import sha256
from privacy.code_identity import code_hash
from privacy.ledger import (
    BudgetExhaustedError,
    ChargeAbandonedError,
    Ledger,
    ReplyExpiredError,
    StoredReply,
)
from privacy.ledger_entry import ChargeRequest
from privacy.release import release


@dataclass(frozen=True, kw_only=True)
class Node:
    """One participant.

    new_secret: charge id → 256-bit secret; operating-system entropy except in simulation.
    """

    records: Records
    schema: Schema
    declared_size: int
    policy: Policy
    ledger: Ledger
    new_secret: Callable[[str], bytes]

    def describe(self) -> Description:
        """Say what is public about this node."""
        return Description(
            public_key=self.ledger.genesis.public_key,
            declared_size=self.declared_size,
            expert_capacity=self.policy.expert_capacity,
        )

    def train(self, request: TrainRequest, content: RecordDict) -> RecordDict:
        """Check, charge, train, commit; return the content of the reply.

        The charge is durable before a record is touched. A request that was answered before gets the stored
        bytes again and costs nothing.

        Raises:
            ProtocolError: with the code that the server may see.
        """
        plan = request.plan
        self.policy.admit(plan)
        if plan.privacy.unit != self.ledger.genesis.unit:
            raise ProtocolError("not-allowed", f"this node's budget protects a {self.ledger.genesis.unit}")
        if plan.privacy.unit == "group" and GROUP not in self.records:
            raise ProtocolError("schema-mismatch", "the records have no groups")
        self._check_assignment(plan, request)
        expected = parameters.shapes(plan.model, request.held)
        if sum(shape.numel() for shape in expected.values()) > self.policy.max_parameters:
            raise ProtocolError("not-allowed", "the model is larger than this node allows")
        tensors = tensors_of(content, expected)
        charge = _charge_for(request, body_of(content), seeded=self.policy.simulation)
        try:
            secret = self.new_secret(charge.charge_id(self.ledger.genesis.ledger_id))
            reservation = self.ledger.reserve(charge, secret)
        except BudgetExhaustedError as error:
            raise ProtocolError("budget-exhausted") from error
        except ChargeAbandonedError as error:
            raise ProtocolError("charge-abandoned") from error
        except ReplyExpiredError as error:
            raise ProtocolError("reply-expired") from error
        if isinstance(reservation, StoredReply):
            return encode(TrainReply(charge_id=reservation.charge_id), reservation.body)
        delta = train(plan, request.held, tensors, self.records, self.declared_size, reservation.secret)
        # Only the door's bytes leave: after a race they are another worker's, so the delta itself is not shared.
        body = release(self.ledger, reservation, delta, expected)
        return encode(TrainReply(charge_id=reservation.charge_id), body)

    def _check_assignment(self, plan: Plan, request: TrainRequest) -> None:
        config = plan.model
        mismatch = self.schema.mismatch(config)
        if mismatch is not None:
            raise ProtocolError("schema-mismatch", mismatch)
        if request.round > plan.rounds:
            raise ProtocolError("bad-request", "the round lies outside the plan")
        check_held(request.held, plan, self.policy.expert_capacity)


def check_held(held: HeldExperts, plan: Plan, capacity: int) -> None:
    """Check an assignment: every layer, ascending known ids, enough for top_k, within capacity.

    Raises:
        ProtocolError: ``bad-request``, or ``not-allowed`` for too many experts.
    """
    experts = plan.model.experts
    if sorted(held) != list(range(plan.model.layers)):
        raise ProtocolError("bad-request", "the assignment must name every layer once")
    for ids in held.values():
        if list(ids) != sorted(set(ids)) or not all(0 <= e < experts.routed for e in ids):
            raise ProtocolError("bad-request", "expert ids must be ascending and exist")
        if len(ids) < experts.top_k:
            raise ProtocolError("bad-request", f"{len(ids)} experts, must be at least top_k {experts.top_k}")
        if len(ids) > capacity:
            raise ProtocolError("not-allowed", f"{len(ids)} experts, must be at most {capacity}")


def _numeric_level(plan: Plan) -> Literal["strict", "fast", "uncertified"]:
    if plan.privacy.numeric == "strict":
        return "strict"
    return "uncertified" if plan.privacy.gradients == "ghost" else "fast"


def _charge_for(request: TrainRequest, body: bytes, *, seeded: bool) -> ChargeRequest:
    plan = request.plan
    mechanism = None
    if plan.noise_multiplier is not None:
        mechanism = SampledGaussian(
            sampling_rate=plan.privacy.sampling_rate,
            noise_multiplier=plan.noise_multiplier,
            steps=plan.training.steps,
        )
    return ChargeRequest(
        kind="train",
        run_id=request.run_id,
        round=request.round,
        plan_hash=plan.hash,
        # What is trained on: the weights and which experts they are for.
        model_in_hash=sha256(request.model_dump_json(include={"held"}).encode() + body),
        code_hash=code_hash(),
        mechanism=mechanism,
        clip=plan.privacy.clip,
        releases=("delta",),
        numeric=_numeric_level(plan),
        rng="seeded" if seeded else "os-entropy",
    )
