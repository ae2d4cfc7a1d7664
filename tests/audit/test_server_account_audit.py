"""A server's own account, told anew and signed with its key: what differs from the scenario is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
from lying_ledgers import Told, copy_to_lie_in

from conclave.audit.run import audit_run
from conclave.privacy.accounting.filter import budget_units
from conclave.privacy.accounting.prices import charge_units
from conclave.privacy.ledger import Entry, Genesis, SignedHead
from conclave.privacy.ledger.entry import add_units, charge_id_of
from conclave.privacy.ledger.reading.history import LedgerFile, write_export
from conclave.server.node_level.account import KIND, _seeded_key
from conclave.server.run_directory import RunDirectory
from conclave.server.scenario import read_scenario
from conclave.simulations.shipped import find
from conclave.simulations.simulate import simulate

CHANGES = {
    "federation.cohort": {"kind": "poisson", "rate": 0.5},
    "federation.assignment": "random",
    "federation.weights": "uniform",
    "federation.rounds": 2,
    "partition.nodes": 3,
    "model.width": 8,
    "node_privacy": {"epsilon": 20.0, "delta": 1e-5, "clip": 0.5, "nodes": 8},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> RunDirectory:
    scenario = read_scenario(find("digits"), CHANGES)
    run = RunDirectory.create(scenario, tmp_path_factory.mktemp("account-audit") / "run")
    simulate(scenario, run)
    return run


@pytest.fixture
def run(finished, tmp_path) -> RunDirectory:
    return copy_to_lie_in(finished, tmp_path)


def findings_after(run, change=lambda entry: entry, **constants: str) -> list[str]:
    """Tell the account anew: prices, names, totals, chain, budget and head follow from what is said."""
    history = LedgerFile(run.node_account)
    genesis = Genesis.parse(replace(history.genesis, **constants).line)
    order = float(genesis.order)
    budget = str(budget_units(float(genesis.epsilon), float(genesis.delta), order))
    genesis = replace(genesis, rdp_budget=budget)
    previous, total, told = genesis.hash, "0", []
    for line in history.lines():
        before = Entry.parse(line)
        entry = change(before)
        if entry.charge_id == before.charge_id:
            name = charge_id_of(
                KIND,
                ledger_id=entry.ledger_id,
                run_id=entry.run_id,
                round_number=entry.round,
                plan_hash=entry.plan_hash,
                model_in_hash=entry.model_in_hash,
            )
            entry = replace(entry, charge_id=name)
        price = str(charge_units(entry.mechanism, order)) if entry.state == "RESERVED" else "0"
        total = add_units(total, price)
        told.append(replace(entry, prev_hash=previous, rdp_charge=price, rdp_total=total, rdp_budget=budget))
        previous = told[-1].hash
    head = SignedHead.sign(_seeded_key(run.scenario.seed), genesis.ledger_id, len(told), previous)
    run.node_account.unlink()
    with run.node_account.open("wb") as stream:
        write_export(Told(genesis, told, head), stream)
    result = audit_run(run)
    assert (result.verdict == "VIOLATED") == bool(result.findings)
    return result.findings


def test_an_honest_account_told_anew_is_not_refuted(run):
    assert findings_after(run) == []


CONSTANTS = {
    "unit": ("record", "unit is 'record', must be node by the scenario"),
    "adjacency": ("replace-one", "adjacency is 'replace-one', must be add-or-remove-one by the scenario"),
    "order": ("3.3", "order is '3.3', must be "),
    "mode": ("deployment", "mode is 'deployment', must be simulation by the scenario"),
    "epsilon": ("200", "epsilon is '200', must be 20 by the scenario"),
    "delta": ("0.001", "delta is '0.001', must be 0.00001 by the scenario"),
}


@pytest.mark.parametrize("constant", CONSTANTS)
def test_what_the_account_was_begun_with_is_compared(run, constant):
    value, sentence = CONSTANTS[constant]
    rng = {"rng": "os-entropy"} if constant == "mode" else {}  # as an account of a deployment would say
    found = findings_after(run, lambda entry: replace(entry, **rng), **{constant: value})
    assert any(f"genesis: {sentence}" in finding for finding in found), found


ENTRIES = {
    "another run": ({"run_id": "8"}, "run is '8', the receipts are of "),
    "another plan": ({"plan_hash": "9" * 64}, "plan is '9999"),
    "a round that the plan has not": ({"round": lambda e: e.round + 2}, "round is 3, the plan has rounds 1 to 2"),
    "no round": ({"round": lambda e: e.round - 1}, "round is 0, the plan has rounds 1 to 2"),
    "another model": ({"model_in_hash": "7" * 64}, "its charge id is not that of its run, round"),
    "another name": ({"charge_id": lambda e: e.charge_id[::-1]}, "its charge id is not that of its run, round"),
    "another code": ({"code_hash": "c" * 64}, "code is 'cccc"),
    "more noise": ({"mechanism_text": lambda e: e.mechanism_text.replace('"sigma":"', '"sigma":"9')}, "sigma is 9"),
    "a smaller sample": (
        {"mechanism_text": lambda e: e.mechanism_text.replace('"q":"0.5"', '"q":"0.05"')}, "q is 0.05",
    ),
    "another level": (
        {"mechanism_text": lambda e: e.mechanism_text.replace('"fast"', '"strict"')}, "numeric is strict",
    ),
    "other releases": ({"releases": '["delta"]'}, """releases is '["delta"]', the plan says ["model"]"""),
    "no seed": ({"rng": "os-entropy"}, "rng is 'os-entropy', the plan says seeded"),
    "a plan's end": (
        {"state": lambda e: "CLOSED" if (e.state, e.round) == ("COMMITTED", 2) else e.state},
        "is 'CLOSED', an account has charges alone",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENTRIES)
def test_what_the_account_says_of_a_charge_is_compared(run, name):
    fields, sentence = ENTRIES[name]

    def change(entry):
        return replace(entry, **{key: value(entry) if callable(value) else value for key, value in fields.items()})

    found = findings_after(run, change)
    where = f"{run.node_account}: entry "
    assert any(finding.startswith(where) and sentence in finding for finding in found), found
