"""Nodes that refuse, each for a reason of its own, beside one that takes part: what operator and owners are told."""

from __future__ import annotations

import json

import pytest
from federation import Federation
from soaking import BUDGET, add_node, asked, balanced, serving

pytestmark = pytest.mark.slow

POLICIES = {
    "scenario": ('# scenarios = ["digits", "plan:0123..."]', 'scenarios = ["others"]', "'mixed' is not among those"),
    "noise": ("min_noise_multiplier = 0.3", "min_noise_multiplier = 90.0", "noise is"),
    "rounds": ("max_rounds = 10000", "max_rounds = 1", "rounds is 2, must be at most 1"),
    "steps": ("max_steps = 10000", "max_steps = 1", "steps is 2, must be at most 1"),
    "parameters": (
        "max_parameters = 500000000",
        "max_parameters = 10",
        "as few experts as a token needs, must be at most 10",
    ),
}
"""Node → what its owner changed, and the reason that its log gives."""

OLD_RELEASE = """import importlib.metadata
real = importlib.metadata.version
importlib.metadata.version = lambda name: "0.0.9" if name == "conclave-moe" else real(name)
"""


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """One node that takes part, and one for each reason not to."""
    with serving(tmp_path_factory.mktemp("refusals")) as made:
        add_node(made, "first")
        for name, (old, new, _) in POLICIES.items():
            add_node(made, name, like="second")
            made.edit_node(name, old, new)
        add_node(made, "schema", like="second", columns=12)
        add_node(made, "release", like="second")
        old = made.folder / "old-release"
        old.mkdir()
        (old / "sitecustomize.py").write_text(OLD_RELEASE)
        for name in ("first", *POLICIES, "schema"):
            made.connect(name)
        made.connect("release", PYTHONPATH=f"{old}:{made.environment.get('PYTHONPATH', '')}")
        made.wait_for_nodes(("first", *POLICIES, "schema", "release"))
        yield made


@pytest.fixture(scope="module")
def said(federation) -> str:
    """What the operator sees of a run of two rounds; one node must do for all experts."""
    return federation.must(*asked("mixed", 2), "--set", "federation.experts_per_node=4")


def test_the_run_goes_on_with_whoever_takes_part_and_codes_are_all_that_is_told(federation, said):
    assert "nodes that do not take part: 5 × not-allowed, 1 × schema-mismatch, 1 × version-mismatch" in said
    assert "round 2 of 2: 1 of 1 replies" in said
    for _, _, reason in POLICIES.values():
        assert reason not in said + federation.log("server")
    assert balanced(federation, "mixed-1", ["first"]) == {"first": {1: 1, 2: 1}}


@pytest.mark.parametrize("name", POLICIES)
def test_why_a_policy_refuses_stands_in_the_nodes_log(federation, said, name):
    (line,) = [line for line in federation.log(name).splitlines() if "refused with" in line]
    assert "refused with not-allowed: " in line
    assert POLICIES[name][2] in line
    check = federation.call("node", "check", name, "--scenario", "patients.toml")
    assert check.returncode == 1
    assert "the policy refuses scenario patients" in check.stdout


def test_other_data_are_a_schema_mismatch(federation, said):
    assert "refused with schema-mismatch" in federation.log("schema")
    check = federation.call("node", "check", "schema", "--scenario", "patients.toml")
    assert check.returncode == 1
    assert "the data do not suit scenario patients" in check.stdout


def test_an_older_release_names_both(federation, said):
    assert "refused with version-mismatch: the server's bundle is conclave/conclave" in federation.log("release")
    assert "here is 0.0.9" in federation.log("release")


def test_nobody_who_refused_was_charged(federation, said):
    for name in (*POLICIES, "schema", "release"):
        assert spent(federation, name) == 0.0


def test_an_exhausted_budget_is_one_sentence_and_status_3(federation, said):
    """Only the first node would take part, and 40 is more than it has for ever."""
    before = spent(federation, "first")
    refused = federation.call(*asked("greedy", 2), "--set", f"privacy.epsilon={BUDGET + 8}")
    assert refused.returncode == 3
    (sentence,) = refused.stderr.splitlines()
    assert "no node admits the plan" in sentence
    assert "1 × budget-exhausted" in sentence
    assert spent(federation, "first") == before


def test_nothing_is_left_behind(federation, said):
    for name in ("first", *POLICIES, "schema", "release", "server"):
        assert "Traceback" not in federation.log(name)


def spent(federation: Federation, name: str) -> float:
    return json.loads(federation.must("node", "budget", name, "--json").splitlines()[-1])["budget"]["spent"]
