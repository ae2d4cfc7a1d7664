"""What a plan charges a node's ledgers, message by message. Nodes draw it, and audits compare ledgers with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from conclave.privacy.accounting.mechanisms import Mechanism, SampledGaussian
from conclave.privacy.code_identity import code_hash
from conclave.privacy.ledger import ChargeRequest
from conclave.privacy.ledger.entry import Side
from conclave.privacy.releases.choice_config import ChoicePlan
from conclave.privacy.releases.evaluation_config import EvaluationPlan
from conclave.privacy.releases.load_histogram import release_shares
from conclave.privacy.releases.private_metrics import SENSITIVITY
from conclave.protocol.plan import Plan

if TYPE_CHECKING:
    from conclave.protocol.messages import EvaluateRequest, TrainRequest


@dataclass(frozen=True, kw_only=True)
class PlannedCharges:
    """What a plan charges one side's ledger for one kind of message.

    charge: what all of them have in common; round and model are those of each message.
    count: how many there are in a run. is_due: whether a round has one.
    """

    charge: ChargeRequest
    side: Side
    count: int
    is_due: Callable[[int], bool]


def charges_of(plan: Plan, run_id: str, *, seeded: bool) -> tuple[PlannedCharges, ...]:
    """Return everything that a plan charges a node, training first."""
    rounds = plan.rounds

    def planned(charge: ChargeRequest, side: Side, count: int, due: Callable[[int], bool]) -> PlannedCharges:
        return PlannedCharges(
            charge=charge, side=side, count=count, is_due=lambda number: 1 <= number <= rounds and due(number)
        )

    every = [planned(training_charge(plan, run_id, seeded=seeded), "training", rounds, lambda _: True)]
    if (affinity := plan.affinity) is not None:
        charge = choice_charge(plan, affinity, run_id, seeded=seeded)
        every.append(planned(charge, "training", affinity.count(rounds), affinity.due))
    if (evaluation := plan.evaluation) is not None:
        charge = evaluation_charge(plan, evaluation, run_id, seeded=seeded)
        every.append(planned(charge, "held-out", evaluation.count(rounds), partial(evaluation.due, rounds=rounds)))
    return tuple(every)


def training_charge(plan: Plan, run_id: str, *, seeded: bool) -> ChargeRequest:
    """Return what every round's training of a plan has in common."""
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


def choice_charge(plan: Plan, affinity: ChoicePlan, run_id: str, *, seeded: bool) -> ChargeRequest:
    """Return what every choice of experts of a plan has in common."""
    return replace(
        training_charge(plan, run_id, seeded=seeded),
        kind="choose",
        mechanism=affinity.mechanism(plan.model.layers),
        releases=("choice",),
        parts=(),
    )


def evaluation_charge(plan: Plan, evaluation: EvaluationPlan, run_id: str, *, seeded: bool) -> ChargeRequest:
    """Return what every evaluation of a plan has in common; the held-out side's ledger pays."""
    return replace(
        training_charge(plan, run_id, seeded=seeded),
        kind="evaluate",
        mechanism=evaluation.mechanism,
        clip=SENSITIVITY,
        releases=("metrics",),
        parts=(),
    )


def for_message(charge: ChargeRequest, request: TrainRequest | EvaluateRequest, body: bytes) -> ChargeRequest:
    """Return the charge for one message: its round, and the model that came with it."""
    return replace(charge, round=request.round, model_in_hash=request.model_in_hash(body))


def charged_mechanism(plan: Plan) -> SampledGaussian | None:
    """Return what one round of a plan is charged as; None without privacy."""
    if plan.noise_multiplier is None:
        return None
    return SampledGaussian(
        sampling_rate=plan.privacy.sampling_rate,
        noise_multiplier=plan.noise_multiplier,
        steps=plan.training.steps,
    )


def planned_charges(plan: Plan, side: Side) -> dict[Mechanism, int]:
    """Return what a whole plan is charged as on one side's ledger: mechanism → how often. Nothing without privacy."""
    return {
        planned.charge.mechanism: planned.count
        for planned in charges_of(plan, "", seeded=False)
        if planned.side == side and planned.count and planned.charge.mechanism is not None
    }


def _numeric_level(plan: Plan) -> Literal["strict", "fast", "uncertified"]:
    if plan.privacy.numeric == "strict":
        return "strict"
    return "uncertified" if plan.privacy.gradients == "ghost" else "fast"
