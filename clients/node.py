"""A node: private records, the owner's policy and the ledgers, behind a few plain functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from flwr.app import RecordDict

from conclave.clients.approvals import Approvals
from conclave.clients.capacity import room_for
from conclave.clients.chooser import choice, choice_shapes
from conclave.clients.evaluator import evaluate
from conclave.clients.local_experts import local_experts, packed, state_name
from conclave.clients.node_ledger import HeldOut, LocalState, as_codes, check_receipt, paid
from conclave.clients.policy import Policy, check_held
from conclave.clients.trainer import train
from conclave.data.sources import GROUP
from conclave.data.values.schema import Schema
from conclave.model import parameters
from conclave.model.config import ModelConfig
from conclave.model.experts.config import HeldExperts
from conclave.model.records import Records
from conclave.privacy.ledger import ChargeRequest, Ledger, StoredReply, state_of
from conclave.privacy.ledger.genesis import check_pair
from conclave.privacy.randomness import derive
from conclave.privacy.releases.release import release
from conclave.protocol.charges import PlannedCharges, charges_of
from conclave.protocol.codec import body_of, encode, tensors_of
from conclave.protocol.encodings import encodings_of, wire_form
from conclave.protocol.messages import (
    Admission,
    AdmitRequest,
    ChooseReply,
    ChooseRequest,
    Closed,
    CloseRequest,
    Description,
    EvaluateReply,
    EvaluateRequest,
    HeldOutSide,
    ProtocolError,
    TrainReply,
    TrainRequest,
)
from conclave.protocol.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Node:
    """One participant.

    records: of the units that train. declared_size: of those, public.
    held_out: units that are only evaluated on, and their ledger; None if all units train.
    approvals: where the owner's approvals are; None if nobody is asked.
    new_secret: charge id → 256-bit secret; operating-system entropy except in simulation.

    Raises:
        BadInputError: the two ledgers are not the two sides of one data set.
    """

    records: Records
    schema: Schema
    declared_size: int
    policy: Policy
    ledger: Ledger
    new_secret: Callable[[str], bytes]
    held_out: HeldOut | None = None
    approvals: Approvals | None = None

    def __post_init__(self) -> None:
        if self.held_out is not None:
            check_pair(self.ledger.genesis, self.held_out.ledger.genesis)

    def describe(self, model: ModelConfig | None = None) -> Description:
        """Say what is public about this node, and how many experts of each of a model's layers it can hold.

        Raises:
            ProtocolError: ``not-allowed``, not even one expert of the model fits.
        """
        with as_codes():
            capacity = self.policy.expert_capacity if model is None else self.policy.capacity(model)
        if capacity < 1:
            raise ProtocolError("not-allowed", "not one expert of this model fits into policy.memory_mb")
        aside = None
        if self.held_out is not None and self.policy.evaluates:
            aside = HeldOutSide(
                public_key=self.held_out.ledger.genesis.public_key,
                rotations=tuple(self.held_out.ledger.rotations),
                share=float(self.held_out.ledger.genesis.held_out),
            )
        return Description(
            public_key=self.ledger.genesis.public_key,
            rotations=tuple(self.ledger.rotations),
            declared_size=self.declared_size,
            expert_capacity=capacity,
            held_out=aside,
        )

    def admit(self, request: AdmitRequest) -> Admission:
        """Check a plan and set the budget for all its rounds aside, before the first of them.

        The held-out side's budget is set aside with the first evaluation; whether there is any does not matter here.

        Raises:
            ProtocolError: with the code that the server may see.
        """
        self._check_plan(request.plan, request.scenario, request.run_id)
        self._set_aside(request.plan, request.run_id)
        return Admission(plan_hash=request.plan.hash)

    def close(self, request: CloseRequest) -> Closed:
        """Give back what is set aside for a run."""
        with as_codes():
            self.ledger.close_plans(request.run_id)
            if self.held_out is not None:
                self.held_out.ledger.close_plans(request.run_id)
        return Closed(run_id=request.run_id)

    def train(self, request: TrainRequest, content: RecordDict) -> RecordDict:
        """Check, charge, train, commit; return the content of the reply.

        The charge is durable before a record is touched. A request that was answered before gets the stored
        bytes again and costs nothing; one that is being answered waits.

        Raises:
            ProtocolError: with the code that the server may see.
        """
        plan = request.plan
        self._check_request(request)
        check_receipt(self.ledger, request.receipt)
        expected = plan.travelling(request.held)  # of what comes; what leaves is in plan.reply_shapes
        tensors = tensors_of(content, expected, encodings_of(plan.traffic.model, expected))
        charge = self._charge(charges_of(plan)["train"], request, content)
        clip_name, experts_name = f"{state_of(request.run_id)}{plan.hash}/clip", state_name(request.run_id, plan)

        set_aside = partial(self._set_aside, plan, request.run_id)

        def state() -> LocalState:
            return self.ledger.local_state(clip_name), self.ledger.local_state(experts_name)

        self._begin(plan, request.scenario, request.run_id)
        with paid(self.ledger, charge, self.new_secret, set_aside, state) as (reservation, (start, kept)):
            if isinstance(reservation, StoredReply):
                return _reply(TrainReply, reservation)
            own = local_experts(plan, request.held, kept)
            trained = train(
                plan,
                request.held,
                {**tensors, **own},
                self.records,
                self.declared_size,
                reservation.secret,
                clip=None if start is None else float(start),
            )
            # Rounded after the noise, by the charge's own secret: the same charge always gives the same bytes.
            form = wire_form(plan.reply_shapes(request.held), encodings_of(plan.traffic.delta, expected))
            delta = {name: trained.delta[name] for name in expected}
            output = form.encode(delta | trained.loads, derive(reservation.secret, "encoding"))
            # Only the door's bytes leave: after a race they are another worker's, so the delta itself is not shared.
            left = {} if trained.clip is None else {clip_name: repr(trained.clip).encode()}
            if own:
                after = {name: tensor + trained.delta[name] for name, tensor in own.items()}
                left[experts_name] = packed(kept, after)
            with as_codes():
                return _reply(TrainReply, release(self.ledger, reservation, output, form.shapes, left, form.dtypes))

    def evaluate(self, request: EvaluateRequest, content: RecordDict) -> RecordDict:
        """Check, charge the held-out side, measure, commit; return the content of the reply. As :meth:`train`.

        Experts that stay here are measured as they are now; they, too, hold only what was trained with noise.

        Raises:
            ProtocolError: with the code that the server may see.
        """
        plan = request.plan
        self._check_request(request)
        self.policy.check_evaluation(plan)
        if self.held_out is None:
            raise ProtocolError("not-allowed", "this node holds no units out of training")
        planned = charges_of(plan).get("evaluate")
        if planned is None or not planned.is_due(request.round):
            raise ProtocolError("bad-request", "the plan has no evaluation after this round")
        ledger = self.held_out.ledger
        check_receipt(ledger, request.receipt)
        expected = plan.travelling(request.held)
        tensors = tensors_of(content, expected, encodings_of(plan.traffic.model, expected))
        charge = self._charge(planned, request, content)

        def set_aside() -> None:
            # When the first evaluation is asked for follows how long the training before it took.
            each = planned.request(request.run_id, seeded=self.policy.simulation)
            with as_codes():
                ledger.admit(each, planned.count, time=self.ledger.admitted_at(request.run_id, plan.hash))

        def state() -> LocalState:
            return (self.ledger.local_state(state_name(request.run_id, plan)),)

        self._begin(plan, request.scenario, request.run_id)
        with paid(ledger, charge, self.new_secret, set_aside, state) as (reservation, (kept,)):
            if isinstance(reservation, StoredReply):
                return _reply(EvaluateReply, reservation)
            whole = {**tensors, **local_experts(plan, request.held, kept)}
            measured = evaluate(plan, request.held, whole, self.held_out.records, reservation.secret)
            with as_codes():
                return _reply(EvaluateReply, release(ledger, reservation, measured, plan.metric_shapes))

    def choose(self, request: ChooseRequest, content: RecordDict) -> RecordDict:
        """Check, charge, choose experts, commit; return the content of the reply. As :meth:`train`.

        Raises:
            ProtocolError: with the code that the server may see.
        """
        plan = request.plan
        self._check_plan(plan, request.scenario, request.run_id)
        planned = charges_of(plan).get("choose")
        if planned is None or not planned.is_due(request.round):
            raise ProtocolError("bad-request", "the plan has no choice before this round")
        if sum(shape.numel() for shape in plan.choosing_shapes.values()) > self.policy.max_parameters:
            raise ProtocolError("not-allowed", "the model is larger than this node allows")
        check_receipt(self.ledger, request.receipt)
        tensors = tensors_of(content, plan.choosing_shapes)
        charge = self._charge(planned, request, content)
        set_aside = partial(self._set_aside, plan, request.run_id)
        self._begin(plan, request.scenario, request.run_id)
        with paid(self.ledger, charge, self.new_secret, set_aside) as (reservation, _):
            if isinstance(reservation, StoredReply):
                return _reply(ChooseReply, reservation)
            capacity = self.policy.capacity(plan.model)
            chosen = choice(plan, tensors, self.records, capacity, reservation.secret)
            with as_codes():
                return _reply(ChooseReply, release(self.ledger, reservation, chosen, choice_shapes(plan, capacity)))

    def _charge(
        self, planned: PlannedCharges, request: TrainRequest | EvaluateRequest | ChooseRequest, content: RecordDict
    ) -> ChargeRequest:
        """Return the charge for one message: its round, and what came with it."""
        return planned.request(
            request.run_id,
            seeded=self.policy.simulation,
            round_number=request.round,
            model_in_hash=request.model_in_hash(body_of(content)),
        )

    def _check_request(self, request: TrainRequest | EvaluateRequest) -> None:
        """Check a request that carries a model."""
        plan = request.plan
        self._check_plan(plan, request.scenario, request.run_id)
        if request.round > plan.rounds:
            raise ProtocolError("bad-request", "the round lies outside the plan")
        check_held(request.held, plan, self.policy.capacity(plan.model))
        with as_codes():
            whole = parameters.shapes(plan.model, request.held)
        if sum(shape.numel() for shape in whole.values()) > self.policy.max_parameters:
            raise ProtocolError("not-allowed", "the model is larger than this node allows")
        with as_codes():
            room_for(plan, request.held)

    def _check_plan(self, plan: Plan, scenario: str, run_id: str) -> None:
        """Check all that public shapes decide, a step on made-up records included; only then is anything charged."""
        self.policy.check(plan, scenario, float(self.ledger.genesis.order))
        if self.approvals is not None:
            self.approvals.check(plan, scenario, needed=not self.policy.unapproved_plans, run_id=run_id)
        if plan.privacy.unit != self.ledger.genesis.unit:
            raise ProtocolError("not-allowed", f"this node's budget protects a {self.ledger.genesis.unit}")
        if plan.privacy.unit == "group" and GROUP not in self.records:
            raise ProtocolError("schema-mismatch", "the records have no groups")
        mismatch = self.schema.mismatch(plan.model)
        if mismatch is not None:
            raise ProtocolError("schema-mismatch", mismatch)
        with as_codes():
            capacity = self.policy.capacity(plan.model)
            if capacity < plan.model.experts.top_k:
                raise ProtocolError("not-allowed", f"{capacity} experts fit, fewer than a token needs")
            room_for(plan, None if plan.model.source is None else self._part_of_own(plan, capacity))

    def _begin(self, plan: Plan, scenario: str, run_id: str) -> None:
        """Bind the run to its approval: the last thing before a charge."""
        if self.approvals is not None and not self.policy.unapproved_plans:
            self.approvals.begin(plan, scenario, run_id)

    def _part_of_own(self, plan: Plan, capacity: int) -> HeldExperts:
        """Return the largest part of a user's own model that this node would take; its code may run now.

        Raises:
            BadInputError: the model cannot be built.
            ProtocolError: ``not-allowed``, even the smallest part is too large.
        """
        most = {layer: ids[:capacity] for layer, ids in plan.model.all_experts.items()}
        if sum(shape.numel() for shape in parameters.shapes(plan.model, most).values()) <= self.policy.max_parameters:
            return most
        self.policy.check_size(plan)
        return {layer: ids[: plan.model.experts.top_k] for layer, ids in plan.model.all_experts.items()}

    def _set_aside(self, plan: Plan, run_id: str) -> None:
        training, *also = [
            (planned.request(run_id, seeded=self.policy.simulation), planned.count)
            for planned in charges_of(plan).values()
            if planned.side == "training"
        ]
        with as_codes():
            self._give_back_unapproved(plan, run_id)
            self.ledger.admit(*training, also)

    def _give_back_unapproved(self, plan: Plan, run_id: str) -> None:
        """Set aside no more for a plan than its approvals allow it to draw, however many run names ask for it.

        The owner is asked again only once every approval is drawn on, so at most one is free: of the runs that drew
        nothing yet, it is for the latest that asks.
        """
        if self.approvals is None or self.policy.unapproved_plans:
            return
        if self.ledger.admitted_at(run_id, plan.hash) is not None:  # nothing is set aside for it anew
            return
        drawing = {run_id, *self.approvals.runs(plan.hash)}
        for name in self.ledger.runs_admitted(plan.hash):
            if name not in drawing:
                self.ledger.close_plan(name, plan.hash)


def _reply(kind: type[TrainReply | EvaluateReply | ChooseReply], stored: StoredReply) -> RecordDict:
    return encode(kind(charge_id=stored.charge_id, receipt=stored.receipt), stored.body)
