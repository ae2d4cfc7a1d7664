"""Whatever a ledger states about itself is compared with the public plan: a consistent lie is named, field by field."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from ledger_samples import entries_of
from lying_ledgers import copy_to_lie_in, exported, kind_of, lie, renamed, stating, times

from conclave.audit.run import audit_run
from conclave.base.canonical import canonical_json
from conclave.privacy.accounting.mechanisms import SampledGaussian
from conclave.privacy.ledger import Entry
from conclave.privacy.ledger.mechanism_text import spell, spell_plan
from conclave.server.run_directory import RunDirectory
from conclave.server.scenario import read_scenario
from conclave.simulations.shipped import find
from conclave.simulations.simulate import simulate

ROUNDS = 5
CHANGES = {
    "federation.rounds": ROUNDS,
    "partition.nodes": 2,
    "model.width": 8,
    "model.experts.hidden": 8,
    "model.experts.router": {"kind": "softmax", "selection_bias": True},
    "training.steps": 2,
    "balancing": {"share": 0.05, "rate": 0.01},
    "federation.assignment": "affinity",
    "affinity": {"epsilon": 0.3, "every": 2},
    "evaluation": {"every": 2, "held_out": 0.3},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> RunDirectory:
    """One run with everything that can be charged: deltas with loads, choices, and metrics of held-out units."""
    scenario = read_scenario(find("digits"), CHANGES)
    run = RunDirectory.create(scenario, tmp_path_factory.mktemp("plan-audit") / "run")
    simulate(scenario, run)
    return run


@pytest.fixture
def run(finished, tmp_path) -> RunDirectory:
    return copy_to_lie_in(finished, tmp_path)


TRAINING, HELD_OUT = 0, 2
"""Places among the exports: of the first node's two ledgers."""


def audit_of(run, change, place=TRAINING, **constants):
    """Audit the run once the owner of one ledger has lied in it; return the result and the ledger's name."""
    paths = exported(run)
    lie(run, paths[place], change, **constants)
    return audit_run(run, paths), str(paths[place])


def honest(entry: Entry) -> Entry:
    return entry


def test_an_honest_ledger_is_not_refuted_told_anew_or_as_it_was(finished, run):
    for result in (audit_run(finished), audit_of(run, honest)[0]):
        assert (result.verdict, result.findings) == ("NOT_REFUTED", [])
        assert (result.unexamined, result.unknown_code) == ({}, {})
        assert result.receipts == result.matched == 2 * (5 + 2 + 3)


def of_kind(kind, **fields):
    """Change fields of every charge of a kind."""

    def change(entry):
        if not entry.run_id or entry.state in ("ADMITTED", "CLOSED") or kind_of(entry) != kind:
            return entry
        return replace(entry, **{name: value(entry) if callable(value) else value for name, value in fields.items()})

    return change


def in_round(kind, round_number, **fields):
    """Change fields of one charge."""
    inner = of_kind(kind, **fields)
    return lambda entry: inner(entry) if entry.round == round_number else entry


def everywhere(**fields):
    return lambda entry: replace(entry, **fields) if entry.run_id else entry


def without_loads(entry):
    """Say that the delta alone was released."""
    changed = stating("train", parts=None)(entry)
    return replace(changed, releases='["delta"]') if kind_of(entry) == "train" and entry.run_id else changed


def admitting(**fields):
    def change(entry):
        if entry.state != "ADMITTED":
            return entry
        return replace(entry, mechanism_text=canonical_json(json.loads(entry.mechanism_text) | fields).decode())

    return change


def evaluated_as_training(entry):
    if entry.state not in ("RESERVED", "COMMITTED"):
        return entry
    return renamed(entry, "train")


def once_more(entry):
    """After round 2's charge, one more of the same round, for another model, that no receipt shows."""
    if (entry.state, entry.round, kind_of(entry)) != ("COMMITTED", 2, "train"):
        return entry
    second = renamed(replace(entry, model_in_hash="7" * 64), "train")
    return [entry, replace(second, state="RESERVED", output_hash="", rdp_charge=once_more.price), second]


def of_state(state, **fields):
    if "round" in fields:
        fields["round"] = int(fields["round"])
    return lambda entry: replace(entry, **fields) if entry.state == state else entry


def without(state):
    return lambda entry: [] if entry.state == state else entry


LIES = {
    # What a charge says of its mechanism.
    "sigma x 5": (stating("train", sigma=times(5), parts=None), 0, ("sigma is ", "the plan says")),
    "sigma x 5 with its parts": (
        stating("train", sigma=times(5), parts=lambda p: {n: times(5)(v) for n, v in p.items()}),
        0,
        ("sigma of loads is ", "the plan says"),
    ),
    "q / 10": (stating("train", q=times(0.1)), 0, ("q is ", "the plan says")),
    "one of two steps": (stating("train", steps=1), 0, ("steps is 1", "the plan says 2")),
    "clip / 100": (stating("train", clip=times(0.01)), 0, ("clip is 0.01", "the plan says 1")),
    "no clip": (stating("train", clip=None), 0, ("clip is not stated", "the plan says 1")),
    "an adaptive clip": (stating("train", adaptive="1"), 0, ("adaptive is 1", "the plan says nothing of it")),
    "strict": (stating("train", numeric="strict"), 0, ("numeric is strict", "the plan says fast")),
    "uncertified": (stating("train", numeric="uncertified"), 0, ("numeric is uncertified", "the plan says fast")),
    "another spelling": (
        stating("train", clip="1.0"), 0, ("clip is 1.0", "the plan says 1"),
    ),
    "loads that have no name": (without_loads, 0, ("sigma of loads is not stated", "the plan says")),
    "releases without loads": (without_loads, 0, ('releases is \'["delta"]\'', 'the plan says ["delta","loads"]')),
    "louder loads": (
        stating("train", parts=lambda p: p | {"loads": times(10)(p["loads"])}),
        0,
        ("sigma of loads is ", "the plan says"),
    ),
    "another scale of loads": (
        stating("train", scale="2"), 0, ("scale is 2", "the plan says nothing of it"),
    ),
    "choice epsilon / 10": (stating("choose", epsilon=times(0.1)), 0, ("epsilon is 0.03", "the plan says 0.3")),
    "fewer choices": (stating("choose", choices=1), 0, ("choices is 1", "the plan says")),
    "metrics sigma x 10": (stating("evaluate", sigma=times(10)), 2, ("sigma is ", "the plan says")),
    "metrics of a sample": (stating("evaluate", q="0.1"), 2, ("q is 0.1", "the plan says 1")),
    "metrics of another clip": (stating("evaluate", clip="0.5"), 2, ("clip is 0.5", "the plan says 1")),
    # What it says of everything else.
    "another rng": (everywhere(rng="os-entropy"), 0, ("rng is 'os-entropy'", "the plan says seeded")),
    "another code": (everywhere(code_hash="c" * 64), 0, ("code is 'cccc", "the run's is ")),
    "another plan": (everywhere(plan_hash="9" * 64), 0, ("is charged for another plan", "'9999", "must be ")),
    "other releases": (of_kind("choose", releases='["rank"]'), 0, ("releases is '[\"rank\"]'", 'says ["choice"]')),
    "the charge rounded down": (
        of_kind("train", rdp_charge=lambda e: e.rdp_charge if e.rdp_charge == "0" else e.rdp_charge[:2]),
        0,
        ("rdp_charge is ", "must be at least"),
    ),
    "no charge for a choice": (of_kind("choose", rdp_charge="0"), 0, ("rdp_charge is '0'", "must be at least")),
    # Which charge it is.
    "an unknown kind": (of_kind("train", charge_id=lambda e: renamed(e, "tune").charge_id), 0, ("of any kind",)),
    "an evaluation called training": (
        evaluated_as_training, 2, ("kind is train", "the plan has none on the held-out side"),
    ),
    "a training called choice": (
        of_kind("train", charge_id=lambda e: renamed(e, "choose").charge_id), 0, ("round is 1", "of kind choose"),
    ),
    "a round beyond the plan": (in_round("train", 5, round=6), 0, ("round is 6", "rounds 1 to 5")),
    "no round": (in_round("train", 1, round=0), 0, ("round is 0", "rounds 1 to 5")),
    "a choice before a round that has none": (in_round("choose", 3, round=4), 0, ("round is 4", "of kind choose")),
    "an evaluation after a round that has none": (
        in_round("evaluate", 2, round=3), 2, ("round is 3", "3 of kind evaluate"),
    ),
    "another run": (everywhere(run_id="8"), 0, ("were received, but no committed charges paid for them",)),
    # What begins and ends a plan.
    **{
        f"{state} with another {name}": (
            of_state(state, **{"mechanism_text" if name == "mechanism" else name: value}), place,
            (f"{name} is {value!r}", said),
        )
        for state, name, value, place, said in (
            ("ADMITTED", "charge_id", "5555", 0, "where it is ADMITTED"),
            ("ADMITTED", "round", "2", 0, "must be 0"),
            ("ADMITTED", "rng", "os-entropy", 2, "the plan says seeded"),
            ("ADMITTED", "releases", '["x"]', 2, "the plan says"),
            ("CLOSED", "rdp_charge", "7", 0, "must be '0'"),
            ("CLOSED", "mechanism", '{"kind":"none"}', 0, "where it is CLOSED"),
            ("COMMITTED", "rdp_charge", "7", 2, "must be '0' where it is COMMITTED"),
            ("RESERVED", "output_hash", "66", 2, "must be '' where it is RESERVED"),
        )
    },
    "ADMITTED by another code": (of_state("ADMITTED", code_hash="c" * 64), 0, ("code is 'cccc", "the run's is ")),
    "an admission that says more": (admitting(note="x"), 0, ("admission is spelled", "the plan's is")),
    "an admission of numbers without end": (
        of_state("ADMITTED", mechanism_text='{"charges":1e999,"kind":"plan","mechanism":"x","units":"1"}'), 0,
        ("admits what cannot be read",),
    ),
    "an older version": (everywhere(version=1), 0, ("format version 1, must be 2",)),
    "older entries without an admission": (
        lambda entry: [] if entry.state in ("ADMITTED", "CLOSED") else replace(entry, version=1), 0,
        ("format version 1, must be 2",),
    ),
    # How often.
    "a round twice": (once_more, 0, ("charges '[\"delta\",\"loads\"]' of run ", "in round 2 once more")),
    "a plan of more rounds": (admitting(charges=6), 0, ("admits 6 charges", "the plan has 5")),
    "a plan without its choices": (admitting(also=[]), 0, ("admits no 2 charges of ", "which the plan has")),
    "no admission": (without("ADMITTED"), 0, ("its plan was not admitted before it was charged",)),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_a_consistent_lie_is_named(run, name):
    change, place, words = LIES[name]
    once_more.price = next(e.rdp_charge for e in entries_of(run.ledgers[0]) if e.state == "RESERVED")
    result, ledger = audit_of(run, change, place)
    assert result.verdict == "VIOLATED"
    own = [finding for finding in result.findings if finding.startswith(ledger)]
    named = [finding for finding in own if name == "another run" or finding.startswith(f"{ledger}: entry ")]
    assert any(all(word in finding for word in words) for finding in named), own
    assert all(ledger in finding or "receipt" in finding for finding in result.findings)  # nobody else is accused


@pytest.mark.parametrize(
    ("constant", "value", "sentence"),
    [
        ("unit", "group", "unit is 'group', must be record by the run's scenario"),
        ("adjacency", "replace-one", "adjacency is 'replace-one', must be add-or-remove-one"),
        ("mode", "deployment", "some ledgers are of a simulation, others are not"),
        ("epsilon", "80", "epsilon is '80', must be 8 by the run's scenario"),
        ("delta", "0.5", "delta is '0.5', must be 0.00001 by the run's scenario"),
        ("held_out", "0.9", "held_out is '0.9', must be 0.3 by the run's scenario"),
        ("rdp_budget", "99999999999999", "genesis: RDP budget 99999999999999, must be at most"),
        ("side", "held-out", "must be for both"),
        ("order", "3.3", "order is '3.3', must be 3.4 by the run's scenario"),
    ],
)
def test_what_a_ledger_was_begun_with_is_compared_too(run, constant, value, sentence):
    result, _ = audit_of(run, lambda entry: replace(entry, rdp_budget=value) if constant == "rdp_budget" else entry,
                         **{constant: value})  # fmt: skip
    assert result.verdict == "VIOLATED"
    found = [finding for finding in result.findings if sentence in finding]
    assert found or (constant == "side" and any("the plan has none on the" in f for f in result.findings)), (
        result.findings
    )


def test_all_ledgers_of_a_simulation_cannot_pass_for_deployed_ones(run):
    paths = exported(run)
    for path in paths:
        lie(run, path, lambda e: replace(e, rng="os-entropy") if e.rng else e, mode="deployment")
    result = audit_run(run, paths)
    assert len([f for f in result.findings if "mode is 'deployment', must be simulation" in f]) == len(paths)


@pytest.mark.parametrize("stated", ["deployment", None, "anything"])
def test_all_ledgers_of_a_deployed_run_cannot_pass_for_simulated_ones(run, stated, tmp_path):
    """Seeded noise and training without privacy would pass with them. What does not say its mode is an older run."""
    paths = [path.rename(tmp_path / f"{number}.jsonl") for number, path in enumerate(exported(run))]
    shutil.rmtree(run.path / "ledgers")
    shutil.rmtree(run.path / "held-out")
    document = run.environment | {"mode": stated}
    (run.path / "environment.json").write_text(json.dumps(document))
    told = [f for f in audit_run(run, paths).findings if "genesis: mode is" in f]
    must = "mode is 'simulation', must be deployment, which the run was"
    assert [must in finding for finding in told] == [True] * (len(paths) if stated == "deployment" else 0)


def test_one_lie_in_many_entries_is_one_finding_that_names_the_first(run):
    result, ledger = audit_of(run, stating("train", numeric="strict"))
    told = f"{ledger}: entry 2 and {ROUNDS - 1} more: numeric is strict, the plan says fast"
    assert result.findings[-1:] == [told] or told in result.findings


def after_an_earlier_run(plan_hash, mechanism):
    """Let one charge of another run come before everything else."""

    def change(entry):
        if entry.state != "ADMITTED":
            return entry
        admitted = spell_plan([(mechanism, 1)], "0")
        fields = {"run_id": "8", "plan_hash": plan_hash, "charge_id": "8" * 64}
        earlier = replace(entry, **fields, mechanism_text=admitted)
        charge = replace(
            earlier, mechanism_text=mechanism, model_in_hash="7" * 64, round=1, releases='["delta"]', rdp_charge="0"
        )
        first = renamed(charge, "train")
        return [
            earlier,
            replace(first, state="RESERVED"),
            replace(first, state="COMMITTED", output_hash="0" * 64),
            replace(earlier, state="CLOSED", mechanism_text='{"kind":"plan-end"}', charge_id="7" * 64),
            entry,
        ]

    return change


def test_what_another_run_was_charged_is_said_to_be_unexamined(run):
    """Its plan is not here, so what it states about itself is all there is."""
    cheap = SampledGaussian(sampling_rate=1.0, noise_multiplier=1e9, steps=1)
    paths = exported(run)
    lie(run, paths[0], after_an_earlier_run("9" * 64, spell(cheap, clip=1.0, numeric="fast", parts={})))
    result = audit_run(run, paths)
    assert (result.verdict, result.findings) == ("INCOMPLETE", [])
    assert result.unexamined == {str(paths[0]): 1}


def test_another_run_at_hand_is_compared_with_its_own_plan(run, tmp_path):
    other = RunDirectory.create(read_scenario(find("digits"), {"federation.rounds": 1}), tmp_path / "other")
    plan = other.scenario.plan()
    cheap = SampledGaussian(sampling_rate=1.0, noise_multiplier=1e9, steps=1)
    paths = exported(run)
    lie(run, paths[0], after_an_earlier_run(plan.hash, spell(cheap, clip=1.0, numeric="fast", parts={})))
    assert audit_run(run, paths).verdict == "INCOMPLETE"
    result = audit_run(run, paths, also=[other])
    assert (result.verdict, result.unexamined) == ("VIOLATED", {})
    assert any(f"entry 2: sigma is 1000000000, the plan says {plan.noise_multiplier}" in f for f in result.findings)


def test_a_run_that_does_not_say_which_code_ran_is_incomplete_until_somebody_vouches(run):
    document = run.environment
    (code,) = document.pop("code")
    (run.path / "environment.json").write_text(json.dumps(document))
    result = audit_run(run)
    assert (result.verdict, result.findings) == ("INCOMPLETE", [])
    assert {tuple(codes) for codes in result.unknown_code.values()} == {(code,)}
    assert audit_run(run, codes=[code]).verdict == "NOT_REFUTED"
    assert audit_run(run, codes=["c" * 64]).verdict == "VIOLATED"


def test_a_run_that_is_resumed_by_other_code_says_so(run, monkeypatch):
    before = run.codes
    run.note_code()
    assert run.codes == before
    monkeypatch.setattr("conclave.server.run_directory.code_hash", lambda: "d" * 64)
    run.note_code()
    assert run.codes == before | {"d" * 64}
