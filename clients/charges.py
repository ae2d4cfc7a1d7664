"""What a node's ledger is charged for each kind of message."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from clients.protocol import EvaluateRequest, Plan, TrainRequest
from privacy.affinity_config import AffinityPlan
from privacy.code_identity import code_hash
from privacy.evaluation_config import EvaluationPlan
from privacy.ledger import ChargeRequest
from privacy.ledger.entry import Side
from privacy.load_histogram import release_shares
from privacy.mechanisms import Mechanism, SampledGaussian
from privacy.private_metrics import SENSITIVITY


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


def choice_charge(plan: Plan, affinity: AffinityPlan, run_id: str, *, seeded: bool) -> ChargeRequest:
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
    if side == "held-out":
        evaluation = plan.evaluation
        if evaluation is None or evaluation.mechanism is None:
            return {}
        return {evaluation.mechanism: evaluation.count(plan.rounds)}
    training = charged_mechanism(plan)
    if training is None:
        return {}
    choices = () if plan.affinity is None else plan.affinity.planned(plan.rounds, plan.model.layers)
    return {training: plan.rounds} | {item.mechanism: item.charges for item in choices}


def _numeric_level(plan: Plan) -> Literal["strict", "fast", "uncertified"]:
    if plan.privacy.numeric == "strict":
        return "strict"
    return "uncertified" if plan.privacy.gradients == "ghost" else "fast"
