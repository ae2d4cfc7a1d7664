"""What a scenario will ask and cost, before anything runs."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from conclave.model import parameters
from conclave.model.building import build, from_state
from conclave.model.experts.config import HeldExperts
from conclave.privacy.accounting.accountants import epsilon_by_accountant
from conclave.privacy.accounting.filter import epsilon_of, fixed_order
from conclave.privacy.accounting.prices import charge_units
from conclave.privacy.randomness import derive
from conclave.privacy.training.dpsgd import train_privately
from conclave.privacy.training.dpsgd_mechanism import DpSgd
from conclave.protocol.charges import charges_of, choice_share, whole_cost
from conclave.protocol.codec import encode
from conclave.protocol.encodings import encodings_of, wire_form
from conclave.protocol.messages import TrainReply, TrainRequest
from conclave.protocol.plan import Plan
from conclave.server.replies.receipts import EMPTY_RECEIPT
from conclave.server.rounds.coverage import outlook
from conclave.server.rounds.traffic import wire_bytes
from conclave.server.scenario import Scenario
from conclave.server.trainable import check_trainable

_MOST_TIMED_RECORDS = 4096


@dataclass(frozen=True)
class PlanEstimate:
    """The arithmetic of a run. ε values are for a node that takes part in every round.

    plan_hash: names the plan; an owner may allow it by this hash.
    noise_parts: σ of each release from one sample; noise_multiplier is that of all together, and would be the
        gradient's own if load_share, what expert loads get of the precision, were 0.
    epsilon: the enforced value. accountants: the same plan by RDP (best order), PLD and PRV, for reading.
    bytes_down, bytes_up: one node, one round, on the wire. bytes_full_model: both ways with the whole model.
    parameters_per_node, bytes: for a node that can hold ``experts_per_node``.
    holders_per_expert: in a round, on average. short_of_holders: share of experts and rounds below ``min_holders``, see
        :func:`conclave.server.rounds.coverage.outlook`.
    evaluations: on held-out units, and evaluation_noise, σ of each; a separate budget pays for them.
    choices: how often nodes choose experts. choice_share: the share of the budget's RDP that this takes.
    node_…: where the node is the unit too: σ, the enforced ε at ``node_delta``; None elsewhere.
    seconds_per_node_round: local training alone, measured on this machine with synthetic records.
    """

    plan_hash: str
    rounds: int
    steps: int
    noise_multiplier: float | None
    noise_parts: dict[str, float]
    load_share: float
    order: float
    epsilon: float
    delta: float
    accountants: dict[str, float]
    parameters_total: int
    parameters_per_node: int
    bytes_down: int
    bytes_up: int
    bytes_full_model: int
    holders_per_expert: float
    short_of_holders: float
    seconds_per_node_round: float
    seconds_total: float
    choices: int = 0
    evaluations: int = 0
    evaluation_noise: float | None = None
    choice_share: float = 0.0
    node_noise_multiplier: float | None = None
    node_epsilon: float | None = None
    node_delta: float | None = None


def estimate(scenario: Scenario, *, units_per_node: int) -> PlanEstimate:
    """Work out what a scenario costs.

    Args:
        units_per_node: public, the mean number of units on a node, for the expected time.

    Raises:
        BadInputError: no noise multiplier satisfies (ε, δ), or the model cannot be trained as the scenario asks.
    """
    check_trainable(scenario)
    plan = scenario.plan()
    rounds, privacy = scenario.federation.rounds, scenario.privacy
    order = fixed_order(privacy.epsilon, privacy.delta)
    epsilon, accountants = float("inf"), dict[str, float]()
    counts = {kind: planned.count for kind, planned in charges_of(plan).items()}
    cost = whole_cost(plan, "training")
    if cost:
        units = sum(count * charge_units(mechanism, order) for mechanism, count in cost.items())
        epsilon = epsilon_of(units, order, privacy.delta)
        accountants = epsilon_by_accountant(cost, privacy.delta)
    everything = scenario.model.all_experts
    held = {layer: ids[: scenario.federation.experts_per_node] for layer, ids in everything.items()}
    down, up, full = exchange_bytes_of(scenario)
    capacities = {f"node {number}": capacity for number, capacity in enumerate(scenario.capacities)}
    layers, routed = scenario.model.layers, scenario.model.experts.routed
    expected = outlook(scenario.federation, routed, layers, capacities, scenario.seed)
    seconds = _seconds(scenario, plan, held, units_per_node)
    node_level, node_mechanism = scenario.node_privacy, scenario.node_mechanism()
    node_epsilon = None
    if node_level is not None and node_mechanism is not None:
        node_order = fixed_order(node_level.epsilon, node_level.delta)
        node_epsilon = epsilon_of(rounds * charge_units(node_mechanism, node_order), node_order, node_level.delta)
    return PlanEstimate(
        plan_hash=plan.hash,
        rounds=rounds,
        steps=rounds * plan.training.steps,
        noise_multiplier=plan.noise_multiplier,
        noise_parts={} if plan.noise_multiplier is None else plan.noise_parts,
        load_share=plan.load_share,
        order=order,
        epsilon=epsilon,
        delta=privacy.delta,
        accountants=accountants,
        parameters_total=_count(plan, everything),
        parameters_per_node=_count(plan, held),
        bytes_down=down,
        bytes_up=up,
        bytes_full_model=full,
        holders_per_expert=expected.holders,
        short_of_holders=expected.short,
        seconds_per_node_round=seconds,
        seconds_total=seconds * rounds * _expected_cohort(scenario),
        evaluations=counts.get("evaluate", 0),
        evaluation_noise=None if plan.evaluation is None else plan.evaluation.noise_multiplier,
        choices=counts.get("choose", 0),
        choice_share=choice_share(plan, order),
        node_noise_multiplier=None if node_mechanism is None else node_mechanism.noise_multiplier,
        node_epsilon=node_epsilon,
        node_delta=None if node_level is None else node_level.delta,
    )


def exchange_bytes_of(scenario: Scenario) -> tuple[int, int, int]:
    """Return bytes to a node and back in one round, and of an exchange both ways with the whole model.

    Raises:
        BadInputError: no noise multiplier satisfies (ε, δ).
    """
    plan = scenario.plan()
    everything = scenario.model.all_experts
    held = {layer: ids[: scenario.federation.experts_per_node] for layer, ids in everything.items()}
    down, up = _bytes(plan, held, scenario.name)
    whole = plan.model_copy(update={"local_experts": 0})
    return down, up, sum(_bytes(whole, everything, scenario.name))


def _count(plan: Plan, held: HeldExperts) -> int:
    return sum(shape.numel() for shape in parameters.shapes(plan.model, held).values())


def _bytes(plan: Plan, held: HeldExperts, scenario: str) -> tuple[int, int]:
    shapes, answered = plan.travelling(held), plan.reply_shapes(held)
    generator = torch.Generator().manual_seed(0)
    # Of some values: equal chunks would be counted once.
    tensors = {name: torch.rand(shape, generator=generator) for name, shape in answered.items()}
    sent = {name: tensors[name] for name in shapes}
    model = wire_form(shapes, encodings_of(plan.traffic.model, shapes)).encode(sent, None)
    delta = wire_form(answered, encodings_of(plan.traffic.delta, shapes)).encode(tensors, bytes(32))
    request = TrainRequest(run_id="0" * 16, scenario=scenario, round=1, plan=plan, held=held, receipt=EMPTY_RECEIPT)
    reply = TrainReply(charge_id="0" * 64, receipt=EMPTY_RECEIPT)
    return wire_bytes(encode(request, model)), wire_bytes(encode(reply, delta))


def _seconds(scenario: Scenario, plan: Plan, held: HeldExperts, units: int) -> float:
    """Time one local step on synthetic records, the very code that nodes run, and scale it to a round."""
    network = build(scenario.model, scenario.seed)
    wire = parameters.split(network.state_dict(), network.held)
    part = {name: wire[name].clone() for name in parameters.select(wire, held)}
    local = from_state(plan.model, held, parameters.join(part, held))
    records = local.synthetic_batch(min(units, _MOST_TIMED_RECORDS))
    step = DpSgd.of(
        plan.privacy.model_copy(
            update={"unit": "record", "records_per_unit": None}
        ),  # synthetic records have no groups
        steps=1,
        learning_rate=plan.training.learning_rate,
        optimizer=plan.training.optimizer,
        noise_multiplier=plan.noise_multiplier,
        load_share=plan.load_share,
        declared_size=units,
    )
    seconds = []
    for trial in range(3):  # the first also warms up
        started = time.perf_counter()
        train_privately(local, local.loss, records, step, derive(bytes(32), "plan", trial))
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:]) * plan.training.steps * max(1.0, units / _MOST_TIMED_RECORDS)


def _expected_cohort(scenario: Scenario) -> float:
    cohort, nodes = scenario.federation.cohort, scenario.nodes
    if cohort.kind == "fixed":
        return float(min(cohort.size, nodes))
    return cohort.rate * nodes if cohort.kind == "poisson" else float(nodes)
