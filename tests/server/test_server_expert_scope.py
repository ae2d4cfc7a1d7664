"""Expert scope, seen from the server and in whole simulations."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load
from server_samples import SmallFederation, ask, delta_for, held_of, make_plan, train_reply

from conclave.audit.run import audit_run
from conclave.base.errors import BadInputError
from conclave.protocol.codec import body_of
from conclave.server.run_directory import RunDirectory
from conclave.server.scenario import read_scenario
from conclave.simulations.shipped import find
from conclave.simulations.simulate import simulate

SMALL = {"federation.rounds": 3, "partition.nodes": 3, "model.width": 8}


def test_requests_hold_what_travels_and_experts_that_stay_keep_their_value():
    plan = make_plan(local_experts=2)
    federation = SmallFederation(plan=plan)
    before = {name: tensor.clone() for name, tensor in federation.model.tensors.items()}
    requests = ask(federation)
    replies = []
    for request in requests:
        travelling = plan.travelling(held_of(request))
        assert load(body_of(request.content)).keys() == travelling.keys()
        whole = delta_for(request, federation)
        replies.append(train_reply(request, {name: whole[name] for name in travelling}))
    outcome = federation.answer(1, replies)
    assert outcome.replies.accepted == len(requests)
    for name, tensor in federation.model.tensors.items():
        assert torch.equal(tensor, before[name]) == plan.stays(name)


def test_a_reply_with_an_expert_that_stays_is_dropped():
    federation = SmallFederation(plan=make_plan(local_experts=6))
    requests = ask(federation)
    outcome = federation.answer(1, [train_reply(request, delta_for(request, federation)) for request in requests])
    assert (outcome.replies.accepted, outcome.replies.dropped) == (0, len(requests))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"federation.expert_scope": "mixed"}, r"federation\.local_experts is 0, must be from 1 to 7"),
        (
            {"federation.expert_scope": "mixed", "federation.local_experts": 8},
            r"federation\.local_experts is 8, must be from 1 to 7",
        ),
        ({"federation.local_experts": 1}, r"must be left out with expert_scope 'federated'"),
        (
            {"federation.expert_scope": "local", "federation.local_experts": 1},
            r"must be left out with expert_scope 'local'",
        ),
        ({"federation.expert_scope": "own"}, r"federation\.expert_scope is 'own', must be"),
    ],
)
def test_contradictions_are_refused(changes, sentence):
    with pytest.raises(BadInputError, match=sentence):
        read_scenario(find("digits"), changes)


@pytest.fixture(scope="module")
def plain_summary(tmp_path_factory):
    scenario = read_scenario(find("digits"), SMALL)
    return simulate(scenario, RunDirectory.create(scenario, tmp_path_factory.mktemp("plain") / "run"))


@pytest.mark.parametrize(
    "scope", [{"federation.expert_scope": "local"}, {"federation.expert_scope": "mixed", "federation.local_experts": 4}]
)
def test_a_run_is_audited_and_sends_less(plain_summary, tmp_path, scope):
    plain = read_scenario(find("digits"), SMALL)
    scenario = read_scenario(find("digits"), SMALL | scope)
    assert plain.plan().hash != scenario.plan().hash
    run = RunDirectory.create(scenario, tmp_path / "run")
    summary = simulate(scenario, run)
    assert audit_run(run).verdict == "NOT_REFUTED"
    assert summary.bytes_per_node < plain_summary.bytes_per_node
    assert summary.epsilon == plain_summary.epsilon
    experts = load((run.path / "model/model.safetensors").read_bytes())
    silent = {name for name, tensor in experts.items() if not tensor.any()}
    assert silent  # what nobody trained does not speak in the published model
    if scope["federation.expert_scope"] == "local":
        last = run.metrics()[-1]
        assert last["accuracy"] == last["accuracy_without_experts"]
