"""What a plan charges is written down once, and everybody who needs it takes it from there."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import pytest
from plan_samples import plan

from conclave.base.errors import BadInputError
from conclave.privacy.accounting.filter import budget_units, fixed_order
from conclave.privacy.accounting.prices import charge_units
from conclave.protocol.charges import calibrated_noise, charges_of, choice_share, release_costs, whole_cost
from conclave.protocol.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
EVERYTHING = {
    "affinity": {"epsilon": 0.2, "every": 3, "experts": 3},
    "evaluation": {"every": 4, "noise_multiplier": 3.0},
    "load_share": 0.1,
    "training": {"learning_rate": 0.5, "steps": 2},
}
SIGMA_1 = {"noise_multiplier": 1.0, "evaluation": {"every": 4, "noise_multiplier": 1.0}}


def test_each_kind_of_message_is_charged_as_the_plan_says():
    said = {
        kind: (p.side, p.count, [n for n in range(-1, 13) if p.is_due(n)], p.releases, p.clip)
        for kind, p in charges_of(plan(**EVERYTHING)).items()
    }
    assert said == {
        "train": ("training", 10, list(range(1, 11)), ("delta", "loads"), 1.0),
        "choose": ("training", 3, [4, 7, 10], ("choice",), 1.0),
        "evaluate": ("held-out", 3, [4, 8, 10], ("metrics",), 1.0),
    }
    said = {kind: json.loads(p.request("1", seeded=True).mechanism_json())
            for kind, p in charges_of(plan(**EVERYTHING)).items()}  # fmt: skip
    gaussian = {"kind": "gaussian", "sampler": "poisson", "numeric": "fast", "clip": "1"}
    parts = said["train"].pop("parts")
    assert said == {
        "train": gaussian | {"q": "0.5", "sigma": "2", "steps": 2},
        "choose": {"kind": "exponential", "epsilon": "0.2", "choices": 3},
        "evaluate": gaussian | {"q": "1", "sigma": "3", "steps": 1},
    }
    assert {name: float(sigma) for name, sigma in parts.items()} == pytest.approx(
        {"delta": 2 / math.sqrt(0.9), "loads": 2 / math.sqrt(0.1)}, rel=1e-12
    )


@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 7, 12])
def test_there_are_as_many_charges_as_rounds_in_which_one_is_due(rounds):
    for planned in charges_of(plan(**EVERYTHING, rounds=rounds)).values():
        assert planned.count == sum(map(planned.is_due, range(-5, 50)))


def test_one_charge_differs_from_the_others_by_its_run_its_round_and_what_came_with_it_alone():
    of = plan(**EVERYTHING)
    for kind, planned in charges_of(of).items():
        one = planned.request("7", seeded=False, round_number=4, model_in_hash="a" * 64)
        assert (one.kind, one.run_id, one.round, one.model_in_hash) == (kind, "7", 4, "a" * 64)
        assert (one.plan_hash, one.rng, one.numeric) == (of.hash, "os-entropy", "fast")
        assert planned.request("7", seeded=True, round_number=4, model_in_hash="a" * 64).rng == "seeded"


def test_the_cost_of_a_side_is_its_mechanisms_and_how_often():
    charges = charges_of(plan(**EVERYTHING))
    assert whole_cost(plan(**EVERYTHING), "training") == {
        charges["train"].mechanism: 10,
        charges["choose"].mechanism: 3,
    }
    assert whole_cost(plan(**EVERYTHING), "held-out") == {charges["evaluate"].mechanism: 3}
    assert whole_cost(plan(), "held-out") == {}
    open_plan = plan(noise_multiplier=None, privacy=plan().privacy.model_copy(update={"mechanism": "none"}))
    assert whole_cost(open_plan, "training") == {}
    assert choice_share(open_plan, 3.4) == choice_share(plan(), 3.4) == 0.0


def test_a_choice_takes_its_share_of_all_rdp_and_training_divides_its_own_precision():
    of, order = plan(**EVERYTHING), 3.4
    charges = charges_of(of)
    choices = 3 * charge_units(charges["choose"].mechanism, order)
    share = choices / (choices + 10 * charge_units(charges["train"].mechanism, order))
    assert release_costs(of, order) == {"delta": 0.9, "loads": 0.1, "choice": share}
    assert choice_share(plan(**EVERYTHING, rounds=3), order) == 0.0  # too few rounds for a choice


@pytest.mark.parametrize(("side", "epsilon"), [("training", 8.0), ("held-out", 2.0)])
def test_calibrated_noise_is_the_least_with_which_the_side_fits_its_budget(side, epsilon):
    order = fixed_order(epsilon, 1e-5)

    def cost(of: Plan) -> int:
        return sum(count * charge_units(mechanism, order) for mechanism, count in whole_cost(of, side).items())

    def at(sigma: float) -> Plan:
        return plan(**EVERYTHING | {"noise_multiplier": sigma, "evaluation": {"every": 4, "noise_multiplier": sigma}})

    sigma = calibrated_noise(plan(**EVERYTHING | SIGMA_1), side, epsilon=epsilon, delta=1e-5)
    assert cost(at(sigma)) <= budget_units(epsilon, 1e-5, order) < cost(at(sigma - 3e-6))
    assert calibrated_noise(at(7.0), side, epsilon=epsilon, delta=1e-5) == sigma  # whatever the draft says


def test_choices_that_leave_nothing_are_refused():
    dear = plan(**EVERYTHING | {"affinity": {"epsilon": 10.0, "every": 1, "experts": 3}})
    with pytest.raises(BadInputError, match="the planned choices alone cost"):
        calibrated_noise(dear, "training", epsilon=1.0, delta=1e-5)


MAY_NAME_A_MECHANISM = {
    "privacy/accounting", "privacy/ledger/mechanism_text.py",
    "protocol/charges.py",
    "privacy/training/make_private.py",  # of training without a plan
    "server/scenario.py",  # of what the server itself publishes, where the node is the unit
}  # fmt: skip


def test_nobody_else_writes_down_what_a_charge_is():
    """A second place would sooner or later say something else."""
    found = set()
    for folder in ("privacy", "protocol", "clients", "server", "simulations", "audit", "report", "deployment", "cli"):
        for path in (ROOT / folder).rglob("*.py"):
            names = {getattr(node.func, "id", "") for node in ast.walk(ast.parse(path.read_text()))
                     if isinstance(node, ast.Call)}  # fmt: skip
            if names & {"SampledGaussian", "ExponentialChoice", "ChargeRequest"}:
                found.add(str(path.relative_to(ROOT)))
    assert {name for name in found if not any(name.startswith(allowed) for allowed in MAY_NAME_A_MECHANISM)} == {
        "server/node_level/account.py"  # draws what the server publishes
    }
