"""Scenarios: one sentence for every mistake; overrides; round trip; σ that just fits the budget."""

from __future__ import annotations

import copy
import tomllib

import pytest
import tomli_w
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.rdp import RdpAccountant

from conclave.base.errors import BadInputError
from conclave.privacy.accounting.filter import budget_units, fixed_order
from conclave.privacy.accounting.mechanisms import SampledGaussian
from conclave.privacy.accounting.prices import charge_units
from conclave.server.scenario import Scenario, parse_override, parse_scenario, read_scenario

GOOD = {
    "name": "small",
    "seed": 7,
    "model": {
        "width": 16,
        "encoder": {"kind": "image-patch", "height": 8, "width": 8, "patch": 4},
        "experts": {"routed": 6, "hidden": 8, "top_k": 2},
        "head": {"kind": "classification", "classes": 10},
    },
    "data": {"source": "digits"},
    "partition": {"scheme": "dirichlet", "nodes": 5, "alpha": 0.5},
    "privacy": {"epsilon": 8.0, "delta": 1e-5, "clip": 1.0, "sampling_rate": 0.1},
    "training": {"steps": 2, "learning_rate": 0.5},
    "federation": {"rounds": 20, "experts_per_node": 3, "cohort": {"kind": "fixed", "size": 3}},
}
TEXT = tomli_w.dumps(GOOD)


def parse(**overrides) -> Scenario:
    return parse_scenario(TEXT, where="here.toml", overrides={k.replace("__", "."): v for k, v in overrides.items()})


def refusal(text=TEXT, overrides=None) -> str:
    with pytest.raises(BadInputError) as caught:
        parse_scenario(text, where="here.toml", overrides=overrides)
    message = str(caught.value)
    assert message.startswith("here.toml: ")
    assert "\n" not in message
    return message.removeprefix("here.toml: ")


def without(key) -> str:
    document = copy.deepcopy(GOOD)
    *parents, last = key.split(".")
    table = document
    for parent in parents:
        table = table[parent]
    del table[last]
    return tomli_w.dumps(document)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        # unknown keys, with the nearest known one
        ("model.experts.topk", 2, "unknown key model.experts.topk, the nearest known key is model.experts.top_k"),
        ("privacy.epsilom", 2, "unknown key privacy.epsilom, the nearest known key is privacy.epsilon"),
        (
            "federation.cohort.sise",
            2,
            "unknown key federation.cohort.sise, the nearest known key is federation.cohort.size",
        ),
        ("partition.alhpa", 2, "unknown key partition.alhpa, the nearest known key is partition.alpha"),
        ("sed", 2, "unknown key sed, the nearest known key is seed"),
        ("model.expert", {}, "unknown key model.expert, the nearest known key is model.experts"),
        ("xyzzy", 2, "unknown key xyzzy"),
        # wrong types
        ("seed", "one", "seed is 'one', must be a valid integer"),
        ("training.steps", 1.5, "training.steps is 1.5, must be a valid integer"),
        ("federation.rounds", [3], "federation.rounds is [3], must be a valid integer"),
        ("privacy.clip", "wide", "privacy.clip is 'wide', must be a valid number"),
        ("name", 3, "name is 3, must be a valid string"),
        ("model", 3, "model is 3, must be a valid dictionary"),
        # out of range
        ("privacy.epsilon", 0.0, "privacy.epsilon is 0.0, must be greater than 0"),
        ("privacy.epsilon", -1, "privacy.epsilon is -1, must be greater than 0"),
        ("privacy.epsilon", float("inf"), "privacy.epsilon is inf, must be a finite number"),
        ("privacy.epsilon", float("nan"), "privacy.epsilon is nan, must be a finite number"),
        ("privacy.delta", 0.0, "privacy.delta is 0.0, must be greater than 0"),
        ("privacy.delta", 1.0, "privacy.delta is 1.0, must be less than 1"),
        ("privacy.sampling_rate", 0.0, "privacy.sampling_rate is 0.0, must be greater than or equal to 0.000000001"),
        ("privacy.sampling_rate", 1.01, "privacy.sampling_rate is 1.01, must be less than or equal to 1"),
        ("seed", -1, "seed is -1, must be greater than or equal to 0"),
        ("seed", True, "seed is True, must be a valid integer"),
        ("training.learning_rate", True, "training.learning_rate is True, must be a valid number"),
        ("name", "a/b", "name is 'a/b', must match pattern"),
        ("partition.alfa", 1.0, "unknown key partition.alfa, the nearest known key is partition.alpha"),
        ("partition.labels_per_node", 2, "partition.labels_per_node has no place beside the other keys of partition"),
        ("partition.all", 1, "unknown key partition.all"),
        (
            "partition.scheme",
            "round",
            "partition.scheme is 'round', must be one of dirichlet, groups, iid, pathological",
        ),
        ("federation.cohort", {"size": 3}, "federation.cohort.kind is missing, must be one of all, fixed, poisson"),
        ("colour", "red", "unknown key colour"),
        ("seed", 2**63, "seed is 9223372036854775808, must be less than 9223372036854775808"),
        ("federation.cohort.size", 0, "federation.cohort.size is 0, must be greater than or equal to 1"),
        ("federation.optimizer.momentum", 1.0, "federation.optimizer.momentum is 1.0, must be less than 1"),
        # not among the choices
        (
            "federation.assignment",
            "fixed",
            "federation.assignment is 'fixed', must be 'all', 'random', 'balanced', 'sticky' or 'affinity'",
        ),
        ("partition.only", 5, "partition: only is 5, must be below the 5 nodes"),
        ("federation.capacities", [3, 0], "federation.capacities.1 is 0, must be greater than or equal to 1"),
        ("federation.capacities", [3, 1], "federation.capacities has 1, must be at least model.experts.top_k 2"),
        (
            "federation.min_holders",
            2,
            "federation.min_holders is 2, must be at most 1: 3 nodes a round × 3 experts hold 9 places, "
            "6 experts × min_holders 2 need 12",
        ),
        ("data.source", "cifar", "data.source is 'cifar', must be 'digits'"),
        ("privacy.unit", "node", "privacy.unit is 'node', must be 'record'"),
        # what does not fit together
        ("model.experts.top_k", 7, "model.experts: top_k is 7, must be at most the 6 routed experts"),
        ("model.experts.top_k", 4, "model.experts.top_k is 4, must be at most federation.experts_per_node 3"),
        (
            "federation.experts_per_node",
            7,
            "federation.experts_per_node is 7, must be at most model.experts.routed 6",
        ),
        ("federation.assignment", "all", "federation.experts_per_node is 3, must be 6 with assignment 'all'"),
        ("model.encoder.patch", 3, "model.encoder: patch is 3, must divide the image sides 8 and 8"),
        ("model.encoder.channels", 3, "model.encoder describes images (3, 8, 8), must be (1, 8, 8)"),
        ("model.encoder.height", 16, "model.encoder describes images (1, 16, 8), must be (1, 8, 8)"),
        ("model.head.classes", 5, "model.head.classes is 5, must be 10 for data.source digits"),
    ],
)
def test_a_mistake_is_one_sentence_with_key_value_and_what_is_allowed(key, value, sentence):
    assert refusal(overrides={key: value}).startswith(sentence)
    document = copy.deepcopy(GOOD)  # the same mistake in the file itself
    table = document
    *parents, last = key.split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
    table[last] = value
    if key != "federation.optimizer.momentum":
        assert refusal(tomli_w.dumps(document)).startswith(sentence)


@pytest.mark.parametrize("name", ["", "a b", "../up", ".hidden", "a/b", "x" * 65, "ä"])
def test_names_that_make_no_file_name_are_refused(name):
    assert refusal(overrides={"name": name}).startswith(f"name is {name!r}")


@pytest.mark.parametrize(
    "key",
    [
        "name",
        "model",
        "model.width",
        "model.encoder.patch",
        "data",
        "privacy.epsilon",
        "privacy.clip",
        "federation.rounds",
        "partition.nodes",
        "federation.cohort.size",
    ],
)
def test_a_missing_key_is_named(key):
    assert refusal(without(key)) == f"{key} is missing"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("partition.scheme", "quantity", ["partition", "quantity", "iid", "dirichlet", "pathological"]),
        ("federation.cohort.kind", "some", ["federation.cohort", "some", "all", "fixed", "poisson"]),
    ],
)
def test_an_unknown_choice_names_the_known_ones(key, value, words):
    message = refusal(overrides={key: value})
    assert all(word in message for word in words)


@pytest.mark.parametrize("text", ["x =", "[a", "a = 1\na = 2", "\x00", "a = nope"])
def test_what_is_no_toml_is_said_to_be_none(text):
    assert refusal(text).startswith("not TOML: ")


def test_files_are_named(tmp_path):
    path = tmp_path / "s.toml"
    for content in (None, b"\xff\xfe\x00"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(BadInputError, match="cannot be read, must be a scenario file in TOML") as caught:
            read_scenario(path)
        assert str(caught.value).startswith(str(path))
    with pytest.raises(BadInputError, match="cannot be read"):
        read_scenario(tmp_path)
    path.write_text(TEXT)
    assert read_scenario(path) == parse()
    assert read_scenario(path, {"seed": 9}).seed == 9


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("privacy.epsilon=3", ("privacy.epsilon", 3)),
        ("privacy.delta = 1e-6", ("privacy.delta", 1e-6)),
        ("a.b=true", ("a.b", True)),
        ("a=[1, 2]", ("a", [1, 2])),
        ('a={ kind = "fixed", size = 2 }', ("a", {"kind": "fixed", "size": 2})),
        ('name="x"', ("name", "x")),
        ("name=x", ("name", "x")),
        ("name= plain words ", ("name", "plain words")),
        ("a=b=c", ("a", "b=c")),
        ("a=", ("a", "")),
    ],
)
def test_an_override_is_toml_or_a_bare_string(text, expected):
    key, value = parse_override(text)
    assert (key, value) == expected
    assert type(value) is type(expected[1])


@pytest.mark.parametrize("text", ["", "seed", "=3", "  =3"])
def test_an_override_without_key_or_value_is_refused(text):
    with pytest.raises(BadInputError, match=r"must have the form key.subkey=value"):
        parse_override(text)


def test_overrides_win_over_the_file_and_make_tables():
    changes = ["federation.optimizer.momentum=0.9", "federation.assignment=random", "privacy.epsilon=3", "seed=4"]
    scenario = parse_scenario(TEXT, where="x", overrides=dict(parse_override(text) for text in changes))
    assert scenario.federation.optimizer.momentum == 0.9
    assert scenario.federation.assignment == "random"
    assert scenario.privacy.epsilon == 3.0
    assert scenario.seed == 4
    assert scenario.privacy.clip == parse().privacy.clip


def test_an_override_below_a_value_is_refused():
    with pytest.raises(BadInputError, match=r"--set seed\.low: seed is a value, must be a table"):
        parse_scenario(TEXT, where="x", overrides={"seed.low": 1})


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"description": 'quotes " and \\ and\nlines and ü', "privacy.delta": 1.2345678901234567e-7, "seed": 2**63 - 1},
        {"privacy.mechanism": "none", "federation.cohort": {"kind": "poisson", "rate": 1 / 3}},
        {"partition": {"scheme": "iid", "nodes": 3}, "federation.cohort": {"kind": "all"}},
        {"partition": {"scheme": "pathological", "nodes": 3, "labels_per_node": 2}, "model.norm": "none"},
    ],
)
def test_the_resolved_scenario_says_the_same_and_spells_out_every_default(overrides):
    scenario = parse_scenario(TEXT, where="x", overrides=overrides)
    text = scenario.to_toml()
    assert parse_scenario(text, where="y") == scenario
    assert parse_scenario(text, where="y").to_toml() == text
    document = tomllib.loads(text)
    assert document == scenario.model_dump(mode="json", exclude_none=True)
    assert document["federation"]["min_holders"] == 1
    assert document["model"]["experts"]["activation"] == "gelu"


def epsilon_at_one_order(scenario, noise) -> float:
    """ε of the whole plan by dp-accounting alone, at the order that the ledger will enforce."""
    order = fixed_order(scenario.privacy.epsilon, scenario.privacy.delta)
    sampled = PoissonSampledDpEvent(scenario.privacy.sampling_rate, GaussianDpEvent(noise))
    steps = scenario.training.steps * scenario.federation.rounds
    accountant = RdpAccountant(orders=[order], neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
    return accountant.compose(SelfComposedDpEvent(sampled, steps)).get_epsilon(scenario.privacy.delta)


@pytest.mark.parametrize(
    "overrides",
    [{}, {"privacy.epsilon": 2.0}, {"privacy.sampling_rate": 0.5, "federation.rounds": 3}, {"training.steps": 50}],
)
def test_the_plans_noise_just_fits_the_budget(overrides):
    scenario = parse_scenario(TEXT, where="x", overrides=overrides)
    plan, privacy = scenario.plan(), scenario.privacy
    assert epsilon_at_one_order(scenario, plan.noise_multiplier) <= privacy.epsilon
    assert epsilon_at_one_order(scenario, 0.99 * plan.noise_multiplier) > privacy.epsilon

    def fits(noise):
        order = fixed_order(privacy.epsilon, privacy.delta)
        charge = SampledGaussian(
            sampling_rate=privacy.sampling_rate, noise_multiplier=noise, steps=scenario.training.steps
        )
        whole = charge_units(charge, order) * scenario.federation.rounds
        return whole <= budget_units(privacy.epsilon, privacy.delta, order)

    assert fits(plan.noise_multiplier)
    assert not fits(0.99 * plan.noise_multiplier)


def test_the_plan_repeats_the_scenario():
    scenario = parse()
    plan = scenario.plan()
    assert (plan.model, plan.privacy, plan.training) == (scenario.model, scenario.privacy, scenario.training)
    assert plan.rounds == 20
    assert plan.hash == parse(name="renamed").plan().hash  # a name is no part of what a node is asked
    assert plan.hash != parse(federation__rounds=21).plan().hash


def test_traffic_is_part_of_the_plan_and_asking_for_nothing_new_keeps_the_hash():
    plain, same = parse(), parse(traffic__delta="fp32", traffic__model="fp32")
    assert plain.plan().hash == same.plan().hash
    assert plain.toml_for_hash() == same.toml_for_hash()
    assert "traffic" not in plain.plan().json_for_hash() + plain.toml_for_hash()
    small = parse(traffic__delta="int8", traffic__model="bf16")
    assert (small.plan().traffic.delta, small.plan().traffic.model) == ("int8", "bf16")
    assert small.plan().hash != plain.plan().hash
    assert refusal(overrides={"traffic.delta": "int4"}) == "traffic.delta is 'int4', must be 'fp32', 'bf16' or 'int8'"
    assert refusal(overrides={"traffic.model": "int8"}) == "traffic.model is 'int8', must be 'fp32' or 'bf16'"


def test_without_privacy_the_plan_has_no_noise():
    assert parse(privacy__mechanism="none").plan().noise_multiplier is None


def test_a_budget_that_no_noise_can_meet_is_bad_input():
    with pytest.raises(BadInputError, match="epsilon"):
        parse(privacy__epsilon=1e-6, privacy__delta=1e-12).plan()


def test_another_scheme_or_kind_by_one_key_forgets_what_only_the_old_one_had():
    assert parse(partition__scheme="iid").partition.model_dump(exclude_none=True) == {"scheme": "iid", "nodes": 5}
    assert parse(federation__cohort__kind="all").federation.cohort.kind == "all"
    both = parse(partition__scheme="pathological", partition__labels_per_node=2).partition
    assert (both.scheme, both.nodes, both.labels_per_node) == ("pathological", 5, 2)
    # what the caller asks for is never forgotten: it is refused
    wrong = refusal(overrides={"partition.scheme": "iid", "partition.alpha": 1.0})
    assert wrong == "partition.alpha has no place beside the other keys of partition"


def test_hostile_documents_and_overrides_are_refused():
    assert refusal("a=" + "[" * 5000) == "nested too deeply, must be at most 64 tables and arrays in one another"
    for digits in ("9" * 5001, "0x" + "f" * 5001, f"[{2**64}]"):
        assert refusal(f"a = {digits}") == "an integer is too long, must have at most 64 bits"
        with pytest.raises(BadInputError, match=r"^--set seed: an integer is too long"):
            parse_override(f"seed={digits}")
    for deep in ("[" * 3000, "{a" + ".a" * 3000 + "=1}"):
        with pytest.raises(BadInputError, match=r"^--set a: nested too deeply"):
            parse_override(f"a={deep}")
    for text in (r'a = "b\u0000"', r'"a\u0000" = 1', r'a = [{b = "\u0000"}]'):
        assert "has the character U+0000, must be text that can be a name or a path" in refusal(text)
    assert refusal(overrides={"model" + ".a" * 3000: 1}).startswith("nested too deeply")
    with pytest.raises(BadInputError, match="must set one key to one value"):
        parse_override("a=1\nb=2")


def test_the_noise_test_is_off_by_default_and_then_part_of_no_hash():
    assert parse().federation.noise_test is None
    assert "noise_test" not in parse().to_toml()
    on = parse(federation__noise_test={})
    assert on.federation.noise_test is not None
    assert on.federation.noise_test.signal == 1.0
    assert on.plan().hash == parse().plan().hash  # no node need know
    assert parse_scenario(on.to_toml(), where="x").federation == on.federation
    assert refusal(overrides={"federation.noise_test.signal": 1.5}) == (
        "federation.noise_test.signal is 1.5, must be less than or equal to 1"
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("privacy.mechanism", "none", "privacy.mechanism is none, must be gaussian"),
        ("privacy.clipping", "adaptive", "privacy.clipping is adaptive, must be flat or per-layer or automatic"),
        ("training.optimizer.kind", "adam", "training.optimizer.kind is adam, must be sgd"),
    ],
)
def test_the_noise_test_is_refused_where_the_noise_is_not_public(key, value, message):
    found = refusal(overrides={key: value, "federation.noise_test": {}})
    assert found.startswith(f"{message} with federation.noise_test: ")


def test_the_noise_test_is_refused_where_the_node_is_the_unit():
    overrides = {
        "federation.noise_test": {},
        "federation.cohort": {"kind": "poisson", "rate": 0.5},
        "federation.assignment": "random",
        "federation.weights": "uniform",
        "node_privacy": {"epsilon": 8.0, "delta": 1e-5, "clip": 1.0, "nodes": 10},
    }
    assert refusal(overrides=overrides) == "federation.noise_test is set, must be left out with node_privacy"
