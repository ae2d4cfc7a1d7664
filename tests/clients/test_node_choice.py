"""A node that chooses experts: allowed, due, charged before it looks, released once."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import make_config
from node_samples import make_node
from plan_samples import plan
from safetensors.torch import load

import conclave.clients.node
from conclave.model import parameters
from conclave.model.building import build
from conclave.privacy.accounting.filter import fixed_order
from conclave.privacy.accounting.mechanisms import ExponentialChoice
from conclave.privacy.accounting.prices import charge_units
from conclave.protocol.charges import release_costs
from conclave.protocol.codec import body_of, decode, encode
from conclave.protocol.messages import AdmitRequest, ChooseReply, ChooseRequest, ProtocolError
from conclave.protocol.tensor_array import pack

AFFINITY = {"epsilon": 0.2, "every": 2, "experts": 3}
PLAN = plan(affinity=AFFINITY)
RELEASES = {"delta": 1.0, "choice": 1.0}
ORDER = fixed_order(8.0, 1e-5)
"""Of the nodes' ledgers."""


def ask(node, asked=PLAN, round_number=3, seed=1):
    network = build(asked.model, seed)
    wire = parameters.split(network.state_dict(), network.held)
    sent = pack({name: wire[name] for name in asked.choosing_shapes})
    request = ChooseRequest(run_id="1", scenario="test", round=round_number, plan=asked)
    content = node.choose(request, encode(request, sent))
    return decode(content, ChooseReply), body_of(content)


def refusal(node, asked=PLAN, round_number=3, **options):
    before = len(node.ledger.entries())
    with pytest.raises(ProtocolError) as caught:
        ask(node, asked, round_number, **options)
    assert len(node.ledger.entries()) == before, "a refusal must cost nothing"
    return caught.value.code


def test_a_choice_is_charged_as_many_choices_and_answers_an_order(tmp_path):
    node = make_node(tmp_path, releases=RELEASES)
    reply, body = ask(node)
    assert {name: len(ids) for name, ids in load(body).items()} == {"choice/0": 3}
    admitted, reserved, committed = node.ledger.entries()
    assert [entry.state for entry in (admitted, reserved, committed)] == ["ADMITTED", "RESERVED", "COMMITTED"]
    assert json.loads(reserved.mechanism_text) == {"choices": 3, "epsilon": "0.2", "kind": "exponential"}
    order = float(node.ledger.genesis.order)
    assert int(reserved.rdp_charge) == charge_units(ExponentialChoice(epsilon=0.2, choices=3), order)
    assert (reserved.releases, reserved.charge_id) == ('["choice"]', reply.charge_id)
    assert reply.receipt.hash == committed.hash


def test_every_layer_is_paid_for(tmp_path):
    two = PLAN.model_copy(update={"model": make_config().model_copy(update={"layers": 2})})
    node = make_node(tmp_path, releases=RELEASES)
    _, body = ask(node, two)
    assert load(body).keys() == {"choice/0", "choice/1"}
    assert json.loads(node.ledger.entries()[1].mechanism_text)["choices"] == 6


@pytest.mark.parametrize("round_number", [1, 2, 4, 11])
def test_a_round_without_a_choice_in_the_plan_is_refused(tmp_path, round_number):
    assert refusal(make_node(tmp_path, releases=RELEASES), PLAN, round_number) == "bad-request"


def test_a_plan_without_choices_is_refused(tmp_path):
    assert refusal(make_node(tmp_path, releases=RELEASES), plan()) == "bad-request"


def test_an_owner_who_does_not_allow_it_is_not_asked_twice(tmp_path):
    node = make_node(tmp_path)  # the default allows deltas only
    assert refusal(node) == "not-allowed"
    with pytest.raises(ProtocolError) as caught:
        node.admit(AdmitRequest(run_id="1", scenario="test", plan=PLAN))
    assert caught.value.code == "not-allowed"


def test_a_share_above_what_the_owner_allows_is_refused(tmp_path):
    share = release_costs(PLAN, ORDER)["choice"]
    assert 0.0 < share < 0.5
    assert refusal(make_node(tmp_path / "a", releases={"delta": 1.0, "choice": 0.9 * share})) == "not-allowed"
    assert ask(make_node(tmp_path / "b", releases={"delta": 1.0, "choice": 1.1 * share}))


def test_a_plan_that_asks_for_less_epsilon_does_not_make_its_choices_look_cheaper(tmp_path):
    """At the order of a small epsilon, sampled steps are dear; what counts is the order of the ledger that pays."""
    share = release_costs(PLAN, ORDER)["choice"]
    modest = PLAN.model_copy(update={"privacy": PLAN.privacy.model_copy(update={"epsilon": 0.1})})
    assert release_costs(modest, fixed_order(0.1, 1e-5))["choice"] < 0.5 * share
    for number, asked in enumerate((PLAN, modest)):
        node = make_node(tmp_path / str(number), releases={"delta": 1.0, "choice": 0.9 * share})
        assert refusal(node, asked) == "not-allowed"


def test_a_model_larger_than_the_owner_allows_is_refused(tmp_path):
    assert refusal(make_node(tmp_path, releases=RELEASES, max_parameters=10)) == "not-allowed"


def test_a_redelivery_gets_the_same_bytes_and_costs_nothing(tmp_path):
    node = make_node(tmp_path, releases=RELEASES)
    first, spent = ask(node), node.ledger.epsilon_spent
    assert ask(node) == first
    assert node.ledger.epsilon_spent == spent
    assert refusal(node, seed=2) == "already-charged"  # of other weights: a second choice in the plan's one round


def test_the_charge_is_durable_before_a_record_is_looked_at_and_a_crash_chooses_the_same(tmp_path, monkeypatch):
    node = make_node(tmp_path / "a", releases=RELEASES)

    def crash(*args):
        assert [entry.state for entry in node.ledger.entries()] == ["ADMITTED", "RESERVED"]
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(conclave.clients.node, "choice", crash)
        with pytest.raises(MemoryError):
            ask(node)
    assert ask(node)[1] == ask(make_node(tmp_path / "b", releases=RELEASES))[1]


def test_no_record_is_needed(tmp_path):
    """An empty data set chooses too: that it is empty must not show otherwise."""
    node = make_node(tmp_path, releases=RELEASES)
    object.__setattr__(node, "records", {name: tensor[:0] for name, tensor in node.records.items()})
    ids = load(ask(node)[1])["choice/0"]
    assert len(torch.unique(ids)) == 3
