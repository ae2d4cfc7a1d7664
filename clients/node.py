"""A node: private records, the owner's policy and the ledger, behind a few plain functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from flwr.app import RecordDict

from clients.chooser import choice, choice_shapes
from clients.encodings import encodings_of, wire_form
from clients.local_experts import local_experts, packed, state_name
from clients.policy import Policy
from clients.protocol import (
    Admission,
    AdmitRequest,
    ChooseReply,
    ChooseRequest,
    Closed,
    CloseRequest,
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
from model import BadInputError, HeldExperts, ModelConfig, parameters
from privacy.affinity_config import AffinityPlan
from privacy.canonical import canonical_json, sha256
from privacy.code_identity import code_hash
from privacy.ledger import (
    BudgetExhaustedError,
    ChargeAbandonedError,
    ChargeConflictError,
    ChargeRequest,
    Ledger,
    LedgerMismatchError,
    PlanClosedError,
    ReplyExpiredError,
    Reservation,
    SignedHead,
    StoredReply,
)
from privacy.load_histogram import release_shares
from privacy.mechanisms import SampledGaussian
from privacy.randomness import derive
from privacy.release import release
from privacy.repeatability import repeat_key


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

    def describe(self, model: ModelConfig | None = None) -> Description:
        """Say what is public about this node, and how many experts of a model's layers it can hold.

        Raises:
            ProtocolError: ``not-allowed``, not one expert of the model fits.
        """
        capacity = self.policy.expert_capacity if model is None else self.policy.capacity(model)
        if capacity < 1:
            raise ProtocolError("not-allowed", "not one expert of this model fits into policy.memory_mb")
        return Description(
            public_key=self.ledger.genesis.public_key,
            rotations=tuple(self.ledger.rotations),
            declared_size=self.declared_size,
            expert_capacity=capacity,
        )

    def admit(self, request: AdmitRequest) -> Admission:
        """Check a plan and set the budget for all its rounds aside, before the first of them.

        Raises:
            ProtocolError: with the code that the server may see.
        """
        self._check_plan(request.plan, request.scenario)
        self._set_aside(request.plan, request.run_id)
        return Admission(plan_hash=request.plan.hash)

    def close(self, request: CloseRequest) -> Closed:
        """Give back what is set aside for a run."""
        with _as_codes():
            self.ledger.close_plans(request.run_id)
        return Closed(run_id=request.run_id)

    def train(self, request: TrainRequest, content: RecordDict) -> RecordDict:
        """Check, charge, train, commit; return the content of the reply.

        The charge is durable before a record is touched. A request that was answered before gets the stored
        bytes again and costs nothing; one that is being answered waits.

        Raises:
            ProtocolError: with the code that the server may see.
        """
        plan = request.plan
        self._check_plan(plan, request.scenario)
        if request.round > plan.rounds:
            raise ProtocolError("bad-request", "the round lies outside the plan")
        check_held(request.held, plan, self.policy.capacity(plan.model))
        expected = plan.travelling(request.held)  # of what comes; what leaves is in plan.reply_shapes
        whole = parameters.shapes(plan.model, request.held)
        if sum(shape.numel() for shape in whole.values()) > self.policy.max_parameters:
            raise ProtocolError("not-allowed", "the model is larger than this node allows")
        self._check_receipt(request.receipt)
        tensors = tensors_of(content, expected, encodings_of(plan.traffic.model, expected))
        charge = _charge_for(request, body_of(content), seeded=self.policy.simulation)
        clip_name, experts_name = f"{request.run_id}/{plan.hash}/clip", state_name(request.run_id, plan)
        with self._paid(plan, charge, clip_name, experts_name) as (paid, (start, kept)):
            if isinstance(paid, StoredReply):
                return _reply(TrainReply, paid)
            own = local_experts(plan, request.held, kept)
            trained = train(
                plan,
                request.held,
                {**tensors, **own},
                self.records,
                self.declared_size,
                paid.secret,
                clip=None if start is None else float(start),
            )
            # Rounded after the noise, by the charge's own secret: the same charge always gives the same bytes.
            form = wire_form(plan.reply_shapes(request.held), encodings_of(plan.traffic.delta, expected))
            delta = {name: trained.delta[name] for name in expected}
            output = form.encode(delta | trained.loads, derive(paid.secret, "encoding"))
            # Only the door's bytes leave: after a race they are another worker's, so the delta itself is not shared.
            state = {} if trained.clip is None else {clip_name: repr(trained.clip).encode()}
            if own:
                after = {name: tensor + trained.delta[name] for name, tensor in own.items()}
                state[experts_name] = packed(kept, after)
            with _as_codes():
                return _reply(TrainReply, release(self.ledger, paid, output, form.shapes, state, form.dtypes))

    def choose(self, request: ChooseRequest, content: RecordDict) -> RecordDict:
        """Check, charge, choose experts, commit; return the content of the reply. As :meth:`train`.

        Raises:
            ProtocolError: with the code that the server may see.
        """
        plan = request.plan
        self._check_plan(plan, request.scenario)
        if plan.affinity is None or request.round > plan.rounds or not plan.affinity.due(request.round):
            raise ProtocolError("bad-request", "the plan has no choice before this round")
        if sum(shape.numel() for shape in plan.choosing_shapes.values()) > self.policy.max_parameters:
            raise ProtocolError("not-allowed", "the model is larger than this node allows")
        self._check_receipt(request.receipt)
        tensors = tensors_of(content, plan.choosing_shapes)
        charge = replace(
            _choice_charge(plan, plan.affinity, request.run_id, seeded=self.policy.simulation),
            round=request.round,
            model_in_hash=sha256(body_of(content)),
        )
        with self._paid(plan, charge) as (paid, _):
            if isinstance(paid, StoredReply):
                return _reply(ChooseReply, paid)
            capacity = self.policy.capacity(plan.model)
            chosen = choice(plan, tensors, self.records, capacity, paid.secret)
            with _as_codes():
                return _reply(ChooseReply, release(self.ledger, paid, chosen, choice_shapes(plan, capacity)))

    @contextmanager
    def _paid(
        self, plan: Plan, charge: ChargeRequest, *names: str
    ) -> Iterator[tuple[Reservation | StoredReply, tuple[bytes | None, ...]]]:
        """Reserve a charge of a plan and hold the ledger's lease while its work is done.

        Args:
            names: of local state that the output follows from, read under the lease.

        Yields:
            What pays, or the reply that was stored before; and the local state.
        """
        charge_id = charge.charge_id(self.ledger.genesis.ledger_id)
        if not self.ledger.knows(charge_id) and not self.ledger.is_open(charge.run_id, charge.plan_hash):
            self._set_aside(plan, charge.run_id)
        with self.ledger.lease():
            states = tuple(self.ledger.local_state(name) for name in names)
            secret = self.new_secret(charge_id)
            key = repeat_key(torch.device("cpu"), _joined(states))
            with _as_codes():
                reservation = self.ledger.reserve(charge, secret, repeat_key=key)
            yield reservation, states

    def _check_plan(self, plan: Plan, scenario: str) -> None:
        self.policy.check(plan, scenario)
        if plan.privacy.unit != self.ledger.genesis.unit:
            raise ProtocolError("not-allowed", f"this node's budget protects a {self.ledger.genesis.unit}")
        if plan.privacy.unit == "group" and GROUP not in self.records:
            raise ProtocolError("schema-mismatch", "the records have no groups")
        mismatch = self.schema.mismatch(plan.model)
        if mismatch is not None:
            raise ProtocolError("schema-mismatch", mismatch)

    def _set_aside(self, plan: Plan, run_id: str) -> None:
        charge = _charge(plan, run_id, seeded=self.policy.simulation)
        also = []
        if plan.affinity is not None:
            choosing = _choice_charge(plan, plan.affinity, run_id, seeded=self.policy.simulation)
            also.append((choosing, plan.affinity.count(plan.rounds)))
        with _as_codes():
            self.ledger.admit(charge, plan.rounds, also)

    def _check_receipt(self, receipt: SignedHead | None) -> None:
        """Compare with what the server has of this ledger: it must not have seen more than is here."""
        if receipt is None or self.ledger.holds(receipt):
            return
        keys = (self.ledger.genesis.public_key, *(rotation.new_key for rotation in self.ledger.rotations))
        if receipt.ledger_id != self.ledger.genesis.ledger_id or not any(map(receipt.signed_by, keys)):
            raise ProtocolError("bad-request", "the receipt is not of this ledger")
        raise ProtocolError(
            "ledger-mismatch", f"the server has a receipt of entry {receipt.seq}, which this ledger does not hold"
        )


@contextmanager
def _as_codes() -> Iterator[None]:
    """Turn the ledger's answers into the codes that the server may see."""
    try:
        yield
    except BudgetExhaustedError as error:
        raise ProtocolError("budget-exhausted") from error
    except ChargeAbandonedError as error:
        raise ProtocolError("charge-abandoned") from error
    except ChargeConflictError as error:
        raise ProtocolError("bad-request", "the charge was made before with other content") from error
    except ReplyExpiredError as error:
        raise ProtocolError("reply-expired") from error
    except PlanClosedError as error:
        raise ProtocolError("not-allowed", "the plan was closed") from error
    except LedgerMismatchError as error:
        raise ProtocolError("ledger-mismatch", str(error)) from error
    except BadInputError as error:
        raise ProtocolError("not-allowed", str(error)) from error


def _joined(states: tuple[bytes | None, ...]) -> bytes | None:
    """Return what stands for several states at once; None where there are none."""
    if all(state is None for state in states):
        return None
    return canonical_json(["" if state is None else sha256(state) for state in states])


def _reply(kind: type[TrainReply | ChooseReply], stored: StoredReply) -> RecordDict:
    return encode(kind(charge_id=stored.charge_id, receipt=stored.receipt), stored.body)


def _choice_charge(plan: Plan, affinity: AffinityPlan, run_id: str, *, seeded: bool) -> ChargeRequest:
    """Return what every choice of a plan has in common."""
    return replace(
        _charge(plan, run_id, seeded=seeded),
        kind="choose",
        mechanism=affinity.mechanism(plan.model.layers),
        releases=("choice",),
        parts=(),
    )


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
    return replace(
        _charge(request.plan, request.run_id, seeded=seeded),
        round=request.round,
        model_in_hash=request.model_in_hash(body),
    )


def _charge(plan: Plan, run_id: str, *, seeded: bool) -> ChargeRequest:
    """Return what every charge of a plan has in common."""
    return ChargeRequest(
        kind="train",
        run_id=run_id,
        round=0,
        plan_hash=plan.hash,
        model_in_hash="",
        code_hash=code_hash(),
        mechanism=charged_mechanism(plan),
        clip=plan.privacy.clip,
        releases=tuple(release_shares(plan.load_share)),
        numeric=_numeric_level(plan),
        rng="seeded" if seeded else "os-entropy",
        parts=tuple(plan.noise_parts.items()) if plan.load_share else (),
    )


def charged_mechanism(plan: Plan) -> SampledGaussian | None:
    """Return what one round of a plan is charged as; None without privacy."""
    if plan.noise_multiplier is None:
        return None
    return SampledGaussian(
        sampling_rate=plan.privacy.sampling_rate,
        noise_multiplier=plan.noise_multiplier,
        steps=plan.training.steps,
    )
