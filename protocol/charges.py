"""What a plan charges a node's ledgers, message by message: the one place where that is written down.

Nodes draw it, servers calibrate σ and estimate with it, owners are told of it, and audits compare ledgers with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from conclave.privacy.accounting.calibration import PlannedChoices, calibrate_noise
from conclave.privacy.accounting.mechanisms import ExponentialChoice, Mechanism, SampledGaussian
from conclave.privacy.accounting.prices import charge_units
from conclave.privacy.ledger import ChargeRequest
from conclave.privacy.ledger.genesis import Side
from conclave.privacy.releases.load_histogram import release_shares
from conclave.privacy.releases.private_metrics import SENSITIVITY
from conclave.protocol.code_identity import code_hash
from conclave.protocol.plan import Plan

ChargeKind = Literal["train", "choose", "evaluate"]
"""What a message asks of a node's data."""

CHOICE, METRICS = "choice", "metrics"
"""What leaves a node, besides what its training releases."""

SIDES: dict[ChargeKind, Side] = {"train": "training", "choose": "training", "evaluate": "held-out"}
"""Whose ledger pays: of the units that train, or of those held out."""


@dataclass(frozen=True, kw_only=True)
class PlannedCharges:
    """What a plan charges for one kind of message.

    mechanism: of one charge; None without privacy.
    releases: what leaves, by name. parts: σ of each, where several are made from one sample.
    count: how many charges there are in a run. is_due: whether a round has one.
    """

    plan: Plan
    kind: ChargeKind
    mechanism: Mechanism | None
    clip: float
    releases: tuple[str, ...]
    parts: tuple[tuple[str, float], ...] = ()
    count: int
    is_due: Callable[[int], bool]

    @property
    def side(self) -> Side:
        """Whose ledger pays."""
        return SIDES[self.kind]

    def request(self, run_id: str, *, seeded: bool, round_number: int = 0, model_in_hash: str = "") -> ChargeRequest:
        """Return one charge; without a round and a model, what all of them in a run have in common."""
        return ChargeRequest(
            kind=self.kind,
            run_id=run_id,
            round=round_number,
            plan_hash=self.plan.hash,
            model_in_hash=model_in_hash,
            code_hash=code_hash(),
            mechanism=self.mechanism,
            clip=self.clip,
            releases=self.releases,
            numeric=_numeric_level(self.plan),
            rng="seeded" if seeded else "os-entropy",
            parts=self.parts,
        )


def charges_of(plan: Plan) -> dict[ChargeKind, PlannedCharges]:
    """Return everything that a plan charges a node, by the kind of message, training first."""
    rounds, clip, sigma = plan.rounds, plan.privacy.clip, plan.noise_multiplier

    def within(due: Callable[[int], bool]) -> Callable[[int], bool]:
        return lambda number: 1 <= number <= rounds and due(number)

    step = _gaussian(plan.privacy.sampling_rate, sigma, plan.training.steps)
    planned: dict[ChargeKind, PlannedCharges] = {
        "train": PlannedCharges(
            plan=plan,
            kind="train",
            mechanism=step,
            clip=clip,
            releases=tuple(release_shares(plan.load_share)),
            parts=tuple(plan.noise_parts.items()) if plan.load_share else (),
            count=rounds,
            is_due=within(lambda _: True),
        )
    }
    if (affinity := plan.affinity) is not None:
        planned["choose"] = PlannedCharges(
            plan=plan,
            kind="choose",
            mechanism=ExponentialChoice(epsilon=affinity.epsilon, choices=affinity.experts * plan.model.layers),
            clip=clip,
            releases=(CHOICE,),
            count=affinity.count(rounds),
            is_due=within(affinity.due),
        )
    if (evaluation := plan.evaluation) is not None:
        planned["evaluate"] = PlannedCharges(
            plan=plan,
            kind="evaluate",
            mechanism=_gaussian(1.0, evaluation.noise_multiplier, 1),  # every held-out unit takes part
            clip=SENSITIVITY,
            releases=(METRICS,),
            count=evaluation.count(rounds),
            is_due=within(partial(evaluation.due, rounds=rounds)),
        )
    return planned


def whole_cost(plan: Plan, side: Side) -> dict[Mechanism, int]:
    """Return what a whole plan is charged on one side's ledger: mechanism → how often. Empty without privacy."""
    cost: dict[Mechanism, int] = {}
    for planned in charges_of(plan).values():
        if planned.side == side and planned.count and planned.mechanism is not None:
            cost[planned.mechanism] = cost.get(planned.mechanism, 0) + planned.count
    return cost


def release_costs(plan: Plan, order: float) -> dict[str, float]:
    """Return what leaves a node besides metrics, and each one's share of what the plan costs at an RDP order.

    What training releases from one sample shares its precision, and a choice takes its share of all RDP.

    Args:
        order: of the paying ledger. The plan's own (ε, δ) do not count: at another order, choices look cheaper.
    """
    choice = {} if plan.affinity is None else {CHOICE: choice_share(plan, order)}
    return release_shares(plan.load_share) | choice


def choice_share(plan: Plan, order: float) -> float:
    """Return what share of the plan's RDP at ``order`` its choices of experts take; 0 with none."""
    units = {type(mechanism): count * charge_units(mechanism, order)
             for mechanism, count in whole_cost(plan, "training").items()}  # fmt: skip
    return units.get(ExponentialChoice, 0) / sum(units.values()) if units else 0.0


def calibrated_noise(draft: Plan, side: Side, *, epsilon: float, delta: float) -> float:
    """Return the smallest σ with which all that a plan charges one side's ledger passes the filter of (ε, δ).

    What has its price, choices, is paid first.

    Args:
        draft: the plan with any σ; what it states on that side is not looked at.

    Raises:
        BadInputError: there is none.
    """
    cost = whole_cost(draft, side)
    ((noised, charges),) = ((one, count) for one, count in cost.items() if isinstance(one, SampledGaussian))
    return calibrate_noise(
        epsilon=epsilon,
        delta=delta,
        sampling_rate=noised.sampling_rate,
        steps_per_charge=noised.steps,
        charges=charges,
        choices=tuple(
            PlannedChoices(mechanism=one, charges=count)
            for one, count in cost.items()
            if isinstance(one, ExponentialChoice)
        ),
    )


def _gaussian(sampling_rate: float, noise_multiplier: float | None, steps: int) -> SampledGaussian | None:
    if noise_multiplier is None:
        return None
    return SampledGaussian(sampling_rate=sampling_rate, noise_multiplier=noise_multiplier, steps=steps)


def _numeric_level(plan: Plan) -> Literal["strict", "fast", "uncertified"]:
    if plan.privacy.numeric == "strict":
        return "strict"
    return "uncertified" if plan.privacy.gradients == "ghost" else "fast"
