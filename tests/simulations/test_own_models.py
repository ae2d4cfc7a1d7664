"""A torch model of the user's own goes the whole way: experts, privacy, ledger, audit; and only where allowed."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import make_config
from family_samples import FAMILY
from ledger_samples import entries_of
from safetensors.torch import load_file

import conclave.cli.main
from conclave.audit.model import audit_scenario
from conclave.audit.run import audit_run
from conclave.base.errors import BadInputError
from conclave.clients.node import Node
from conclave.clients.policy import Policy
from conclave.clients.trainer import _scales, train
from conclave.model import parameters
from conclave.model.building import build, from_state
from conclave.model.config import ModelConfig
from conclave.model.costs import costs_of
from conclave.model.store import load
from conclave.privacy.training import rehearsal
from conclave.protocol.messages import ProtocolError
from conclave.protocol.plan import Plan
from conclave.report.report import write_report
from conclave.server.run_directory import RunDirectory
from conclave.server.scenario import Scenario, read_scenario
from conclave.simulations.shipped import find
from conclave.simulations.simulate import simulate

FAST = {"federation.rounds": 4, "partition.nodes": 4, "model.width": 16}


def scenario(source="sample_models:mixture", **changes) -> Scenario:
    own = {"model.preset": "own", "model.source": source, "training.learning_rate": 2.0}
    return read_scenario(find("digits"), FAST | own | changes)


def own_config(source="sample_models:mixture", layers=2) -> ModelConfig:
    document = make_config().model_dump() | {"preset": "own", "source": source, "layers": layers}
    return ModelConfig.model_validate(document)


def test_experts_travel_one_by_one_and_everything_else_is_shared():
    config, held = own_config(), {0: (1, 4), 1: (0, 5)}
    network = build(config, seed=1)
    wire = parameters.split(network.state_dict(), network.held)
    experts = {name for name in wire if name.startswith("expert/")}
    assert len(experts) == 2 * 6 * 2  # layers, experts, weight and bias
    assert "expert/1/5/own.layers.1.experts.5.weight" in experts
    assert {name.partition("/")[0] for name in wire} == {"expert", "shared"}
    mine = {name: wire[name] for name in parameters.select(wire, held)}
    assert {name: tensor.shape for name, tensor in mine.items()} == parameters.shapes(config, held)
    small = from_state(config, held, parameters.join(mine, held))
    again = parameters.split(small.state_dict(), held)
    assert again.keys() == mine.keys()
    assert all(torch.equal(again[name], mine[name]) for name in mine)
    assert costs_of(config).parameters["router"] == 0


def test_the_same_seed_builds_the_same_model_and_leaves_torch_alone():
    before = torch.get_rng_state()
    first, second, other = (build(own_config(), seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    names = list(first.state_dict())
    assert all(torch.equal(first.state_dict()[name], second.state_dict()[name]) for name in names)
    assert not torch.equal(first.state_dict()[names[0]], other.state_dict()[names[0]])


@pytest.mark.parametrize("source", ["sample_models:mixture", "sample_models:plain"])
def test_it_trains_privately_in_a_federation(tmp_path, source):
    run = RunDirectory.create(scenario(source, **{"federation.rounds": 10}), tmp_path / "run")
    summary = simulate(run.scenario, run)
    assert summary.accuracy > 0.5
    assert 7.9 < summary.epsilon <= 8.0
    audit = audit_run(run)
    assert (audit.verdict, audit.matched) == ("NOT_REFUTED", 40)
    assert all(e.releases == '["delta"]' for e in entries_of(run.ledgers[0]) if e.state == "RESERVED")
    assert write_report(run).is_file()
    assert all(json.dumps(line, allow_nan=False) for line in run.metrics())
    with pytest.raises(BadInputError, match="is a model of sample_models"):
        load(run.path / "model")  # a file must not name code that is then run


def test_one_parameter_of_two_names_stays_one_through_a_federation(tmp_path):
    config = own_config("sample_models:two_names", layers=1)
    network = build(config, seed=1)
    state = network.state_dict()
    assert "own.first.weight" in state
    assert "own.second.weight" not in state  # it travels once
    assert sum(p.numel() for p in network.parameters()) == sum(t.numel() for t in state.values())
    again = from_state(config, config.all_experts, {name: tensor + 1 for name, tensor in state.items()})
    assert again.own.second.weight is again.own.first.weight
    assert again.own.memory.l0.ih.weight is again.own.memory.weight_ih_l0
    assert all(torch.equal(tensor, state[name] + 1) for name, tensor in again.state_dict().items())
    run = RunDirectory.create(scenario("sample_models:two_names", **{"federation.rounds": 1}), tmp_path / "run")
    simulate(run.scenario, run)
    wire = load_file(run.path / "model" / "model.safetensors")
    assert wire.keys() == parameters.shapes(config, config.all_experts).keys()
    assert not any(torch.equal(wire[f"shared/{name}"], tensor) for name, tensor in state.items())  # all are trained


@pytest.mark.parametrize("wrong", [{"own.first.weight": None}, {"own.more": 1}, {"own.first.bias": torch.zeros(9)}])
def test_loading_other_parameters_is_an_error(wrong):
    config = own_config("sample_models:two_names", layers=1)
    state = {k: v for k, v in (build(config, seed=1).state_dict() | wrong).items() if v is not None}
    with pytest.raises(RuntimeError, match=next(iter(wrong))):
        from_state(config, config.all_experts, state)


def test_no_model_of_the_family_has_a_parameter_of_two_names():
    for config in (make_config(), *FAMILY.values()):
        network = build(config, seed=1)
        assert len(list(network.named_parameters(remove_duplicate=False))) == len(list(network.parameters()))


def test_the_audit_attacks_it():
    findings = audit_scenario(scenario())
    assert {finding.check for finding in findings} >= {"isolation", "sensitivity", "noise"}
    assert not any(finding.violation for finding in findings)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("sample_models:absent", "cannot be called"),
        ("no_such_module:build", "cannot be called"),
        ("sample_models:nothing", "must return a torch module, not a int"),
        ("sample_models:stateful", "is a buffer, must not be"),
        ("sample_models:narrow", "must be a float32 tensor"),
        ("sample_models:two_owners", "must belong to the same expert, or both to none"),
        ("sample_models:one_memory", "share their memory, must be one parameter"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(source, sentence):
    with pytest.raises(BadInputError, match=sentence):
        build(own_config(source), seed=1)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("dropout", "(Dropout) draws from one stream"),
        ("lazy", "has no shape before the first batch"),
        ("no_file", "cannot be called: RuntimeError: weights are not there"),
        ("seven", "[7, 7] of torch.float32, must be floats [7, 10]"),
    ],
)
@pytest.mark.parametrize("command", ["simulate", "plan", "model"])
def test_a_model_that_cannot_be_trained_is_one_sentence_before_anything_is_charged(
    tmp_path, monkeypatch, capsys, command, source, sentence
):
    changes = FAST | {"model.preset": "own", "model.source": f"sample_models:{source}"}
    options = [f"--set={key}={value}" for key, value in changes.items()]
    options += [f"--out={tmp_path / 'run'}"] if command == "simulate" else []
    monkeypatch.setattr("sys.argv", ["conclave", command, "digits", *options])
    with pytest.raises(SystemExit) as caught:
        conclave.cli.main.main()
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert said.startswith("conclave: ")
    assert sentence in said
    assert len(said.splitlines()) == 1
    assert not list(tmp_path.glob("run/ledgers/*"))


def test_a_run_that_nobody_takes_part_in_is_exit_status_3(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise ProtocolError("budget-exhausted")

    monkeypatch.setattr(Node, "train", refuse)
    options = [f"--set={key}={value}" for key, value in FAST.items()]
    monkeypatch.setattr("sys.argv", ["conclave", "simulate", "digits", *options, f"--out={tmp_path / 'run'}"])
    with pytest.raises(SystemExit) as caught:
        conclave.cli.main.main()
    assert caught.value.code == 3
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith("conclave: the run failed: in round 1 every node refused (4 × budget-exhausted)")
    )


def test_experts_that_were_not_sent_are_refused():
    with pytest.raises(BadInputError, match="is of an expert that is not held"):
        from_state(own_config("sample_models:greedy"), {0: (1, 2), 1: (1, 2)}, {})


@pytest.mark.parametrize(
    "changes",
    [
        {"source": None},
        {"preset": "moe"},
        {"source": "os.system"},
        {"source": "sample_models:mixture; rm"},
        {"source": "../own:mixture"},
    ],
)
def test_the_configuration_names_a_function_or_nothing(changes):
    with pytest.raises(ValueError, match="source"):
        ModelConfig.model_validate(own_config(layers=1).model_dump() | changes)


def test_a_node_runs_no_code_that_its_owner_did_not_name(monkeypatch):
    plan = Plan(
        model=own_config(),
        privacy={"epsilon": 8.0, "delta": 1e-5, "clip": 1.0, "sampling_rate": 0.5},
        training={"learning_rate": 0.5},
        rounds=1,
        noise_multiplier=2.0,
    )
    monkeypatch.setattr("pkgutil.resolve_name", lambda name: pytest.fail(f"{name} was looked up"))
    with pytest.raises(ProtocolError, match=r"is not among those that policy\.models allows") as caught:
        Policy().check(plan, "test", 3.4)
    assert caught.value.code == "not-allowed"
    Policy(models=("sample_models:mixture",)).check(plan, "test", 3.4)


def test_its_experts_can_learn_slower_where_few_are_held():
    held = {0: (1, 4, 5), 1: (0, 2, 3)}
    document = {
        "model": own_config(),
        "privacy": {"epsilon": 8.0, "delta": 1e-5, "clip": 1.0, "sampling_rate": 0.5},
        "training": {"learning_rate": 0.5, "expert_learning_rate": "held"},
        "rounds": 1,
        "noise_multiplier": 2.0,
    }
    network = from_state(own_config(), held, build_part(held))
    scales = _scales(Plan(**document), network, held)
    assert set(scales.values()) == {0.5}
    assert scales.keys() == {name for name, _ in network.named_parameters() if ".experts." in name}


def build_part(held):
    full = build(own_config(), seed=1)
    wire = parameters.split(full.state_dict(), full.held)
    return parameters.join({name: wire[name] for name in parameters.select(wire, held)}, held)


def test_what_its_code_remembers_does_not_outlive_a_charge(monkeypatch):
    """The second charge starts like the first: nothing but the committed release may carry over."""
    # It might remember what made-up records do not show.
    monkeypatch.setattr(rehearsal, "_check_alike", lambda *_: None)
    monkeypatch.setattr(rehearsal, "_rehearsed", rehearsal._rehearsed.__wrapped__)  # no other test is told of it
    config = own_config("sample_models:remembering", layers=1)
    document = {
        "model": config,
        "privacy": {"epsilon": 8.0, "delta": 1e-5, "clip": 1.0, "sampling_rate": 0.5},
        "training": {"learning_rate": 0.5, "steps": 2},
        "rounds": 1,
        "noise_multiplier": 2.0,
    }
    network = build(config, seed=1)
    sent = parameters.split(network.state_dict(), network.held)
    once, again = (
        train(Plan(**document), config.all_experts, sent, network.synthetic_batch(20), 20, bytes(32)).delta
        for _ in range(2)
    )
    assert all(torch.equal(once[name], again[name]) for name in once)
