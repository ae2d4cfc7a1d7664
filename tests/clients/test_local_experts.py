"""Experts that stay: nothing of them travels, they are trained by the same step, and switch with the reply."""

from __future__ import annotations

import pytest
import torch
from node_samples import HELD, body, make_node, train
from plan_samples import plan, request
from safetensors.torch import load

import conclave.clients.node
from conclave.clients import trainer
from conclave.clients.local_experts import local_experts, packed, state_name
from conclave.model import parameters
from conclave.model.building import build
from conclave.protocol.messages import CloseRequest, ProtocolError
from conclave.protocol.tensor_array import pack

MIXED = plan(local_experts=3)  # of experts 0 to 5 these stay: 3, 4, 5
LOCAL = plan(local_experts=6)


def sent_body(asked, held=HELD):
    whole = load(body(held))
    return pack({name: whole[name] for name in asked.travelling(held)})


def kept_by(node, asked) -> dict[str, torch.Tensor]:
    state = node.ledger.local_state(state_name("1", asked))
    return {} if state is None else load(state)


def ask(node, asked, round_number=1, held=HELD, sent=None):
    message = request(held=held, plan=asked, round=round_number)
    return train(node, message, sent or sent_body(asked, held))


def staying(asked, held=HELD):
    return {name for name in parameters.shapes(asked.model, held) if asked.stays(name)}


@pytest.mark.parametrize(("asked", "experts"), [(MIXED, {3, 4}), (LOCAL, {1, 3, 4})])
def test_nothing_of_an_expert_that_stays_is_sent_or_answered(tmp_path, asked, experts):
    _, answer = ask(make_node(tmp_path), asked)
    names = load(answer).keys()
    assert names == asked.travelling(HELD).keys()
    assert {parameters.owner(name).expert for name in staying(asked)} == experts
    assert not names & staying(asked)
    routers = {parameters.owner(name).expert for name in names if name.startswith("router/")}
    assert routers == set(HELD[0])  # their rows of the router do travel


def test_an_expert_that_stays_is_not_accepted_from_outside(tmp_path):
    node = make_node(tmp_path)
    with pytest.raises(ProtocolError) as caught:
        ask(node, MIXED, sent=body())
    assert caught.value.code == "bad-request"
    assert node.ledger.entries() == []


def test_two_rounds_are_what_training_by_hand_gives(tmp_path, monkeypatch):
    secrets = []
    node = make_node(tmp_path)
    original = conclave.clients.node.train

    def spy(*args, **options):
        secrets.append(args[5])
        return original(*args, **options)

    monkeypatch.setattr(conclave.clients.node, "train", spy)
    answers = [load(ask(node, MIXED, number)[1]) for number in (1, 2)]
    network = build(MIXED.model, int(MIXED.hash[:15], 16))
    whole = parameters.split(network.state_dict(), network.held)
    own = {name: whole[name] for name in staying(MIXED)}
    for secret, answer in zip(secrets, answers, strict=True):
        tensors = {**load(sent_body(MIXED)), **own}
        delta = trainer.train(MIXED, HELD, tensors, node.records, node.declared_size, secret).delta
        own = {name: tensor + delta[name] for name, tensor in own.items()}
        assert all(torch.equal(answer[name], delta[name]) for name in answer)
    kept = kept_by(node, MIXED)
    assert kept.keys() == own.keys()
    assert all(torch.equal(kept[name], own[name]) for name in own)


def test_every_local_expert_is_noised_also_without_a_record(tmp_path):
    """Zero records: what remains of the step is noise, on experts that stay as on all others."""
    node = make_node(tmp_path)
    empty = {name: tensor[:0] for name, tensor in node.records.items()}
    object.__setattr__(node, "records", empty)
    ask(node, LOCAL)
    fresh = local_experts(LOCAL, HELD, None)
    assert all((kept_by(node, LOCAL)[name] != fresh[name]).all() for name in fresh)


def test_a_redelivery_moves_no_expert_twice(tmp_path):
    node = make_node(tmp_path)
    first = ask(node, MIXED)
    after = kept_by(node, MIXED)
    assert ask(node, MIXED) == first
    assert all(torch.equal(after[name], tensor) for name, tensor in kept_by(node, MIXED).items())


def crash_at(step, node, monkeypatch):
    """Let a node die in a step of round two."""

    def crash(*args, **options):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(conclave.clients.node, step, crash)
        with pytest.raises(MemoryError):
            ask(node, MIXED, 2)


def test_a_crash_before_the_commit_leaves_them_as_they_were_and_is_repeated(tmp_path, monkeypatch):
    node = make_node(tmp_path / "a")
    ask(node, MIXED)
    before = kept_by(node, MIXED)

    crash_at("release", node, monkeypatch)
    assert all(torch.equal(before[name], tensor) for name, tensor in kept_by(node, MIXED).items())
    again = ask(node, MIXED, 2)[1]
    undisturbed = make_node(tmp_path / "b")
    ask(undisturbed, MIXED)
    assert ask(undisturbed, MIXED, 2)[1] == again


def test_where_the_kept_experts_changed_since_the_crash_the_charge_is_given_up(tmp_path, monkeypatch):
    node = make_node(tmp_path)
    ask(node, MIXED)

    crash_at("train", node, monkeypatch)
    ask(node, MIXED, 3)  # another round goes on, and moves the experts
    with pytest.raises(ProtocolError) as caught:
        ask(node, MIXED, 2)
    assert caught.value.code == "charge-abandoned"


def test_an_expert_that_is_not_held_for_a_while_is_kept(tmp_path):
    node = make_node(tmp_path)
    ask(node, MIXED, 1, {0: (1, 3, 4)})
    first = kept_by(node, MIXED)
    ask(node, MIXED, 2, {0: (1, 3, 5)})
    second = kept_by(node, MIXED)
    fourth = [name for name in first if parameters.owner(name).expert == 4]
    assert fourth
    assert all(torch.equal(first[name], second[name]) for name in fourth)
    assert {parameters.owner(name).expert for name in second} == {3, 4, 5}
    assert local_experts(MIXED, {0: (1, 4)}, packed(None, second)).keys() == set(fourth)


def test_they_outlive_the_run_and_belong_to_it_alone(tmp_path):
    node = make_node(tmp_path)
    ask(node, MIXED)
    for run_id in ("1", "local-experts", "run"):  # the server's word
        node.close(CloseRequest(run_id=run_id))
    assert kept_by(node, MIXED)
    assert node.ledger.local_state(state_name("2", MIXED)) is None
    assert node.ledger.local_state(state_name("1", LOCAL)) is None


def test_without_local_experts_nothing_is_kept(tmp_path):
    node = make_node(tmp_path)
    ask(node, plan(), sent=body())
    assert node.ledger.local_state(state_name("1", plan())) is None
    assert plan(local_experts=0).hash == plan().hash


def test_a_plan_with_more_local_experts_than_there_are_is_refused():
    with pytest.raises(ValueError, match="local_experts is 7, must be at most 6"):
        plan(local_experts=7)


def test_the_charge_is_the_same_with_and_without(tmp_path):
    spent = []
    for number, asked in enumerate((plan(), MIXED, LOCAL)):
        node = make_node(tmp_path / str(number))
        ask(node, asked, sent=sent_body(asked))
        spent.append(node.ledger.epsilon_spent)
    assert spent[0] == spent[1] == spent[2] > 0
