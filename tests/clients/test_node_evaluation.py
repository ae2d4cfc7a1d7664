"""A node that measures on held-out units: allowed, due, charged to their own ledger before it looks, released once."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import make_batch, make_config
from evaluation_samples import ASIDE_KEY, PLAN, ask, held_out_batch, model_of
from ledger_samples import KEY, genesis
from node_samples import HELD
from plan_samples import plan
from safetensors.torch import load

import conclave.clients.node
from conclave.base.errors import BadInputError
from conclave.clients.node import Node
from conclave.clients.node_ledger import HeldOut
from conclave.clients.policy import Policy
from conclave.data.values.schema import ImageSchema
from conclave.model import parameters
from conclave.model.building import from_state
from conclave.model.network import Network
from conclave.privacy.accounting.mechanisms import SampledGaussian
from conclave.privacy.accounting.prices import charge_units
from conclave.privacy.gradients.physical_batch import Room
from conclave.privacy.ledger import Ledger, SignedHead
from conclave.privacy.ledger.heads import public_hex
from conclave.privacy.randomness import derive
from conclave.protocol.codec import body_of, encode
from conclave.protocol.messages import AdmitRequest, CloseRequest, EvaluateRequest, ProtocolError, TrainRequest
from conclave.protocol.tensor_array import pack

OPEN = plan(
    privacy={"mechanism": "none", "epsilon": 8.0, "delta": 1e-5, "clip": 1.0, "sampling_rate": 0.5},
    noise_multiplier=None,
    evaluation={"every": 4, "noise_multiplier": None},
)


def make_node(folder, aside_epsilon=8.0, **policy) -> Node:
    training = replace(genesis(), held_out="0.4")
    aside = replace(genesis(epsilon=aside_epsilon), held_out="0.4").for_held_out(public_hex(ASIDE_KEY))
    return Node(
        records=make_batch(40),
        schema=ImageSchema(image=(1, 8, 8), classes=5),
        declared_size=40,
        policy=Policy(**({"simulation": True, "releases": {"delta": 1.0, "metrics": 1.0}} | policy)),
        ledger=Ledger.create(folder / "ledger.db", training, KEY),
        new_secret=lambda charge_id: derive(bytes(32), charge_id),
        held_out=HeldOut(held_out_batch(), Ledger.create(folder / "held-out.db", aside, ASIDE_KEY)),
    )


def refusal(node, *args, **options):
    before = [len(ledger.entries()) for ledger in (node.ledger, node.held_out.ledger)]
    with pytest.raises(ProtocolError) as caught:
        ask(node, *args, **options)
    after = [len(ledger.entries()) for ledger in (node.ledger, node.held_out.ledger)]
    assert after == before, "a refusal must cost nothing"
    return caught.value.code


def truth(asked, held=HELD, seed=1, tensors=None):
    """The number of held-out records that the model classifies rightly, and wrongly."""
    network = from_state(asked.model, held, parameters.join(tensors or model_of(asked, held, seed), held)).eval()
    batch = held_out_batch()
    with torch.inference_mode():
        right = int((network(batch).scores.argmax(1) == batch["label"]).sum())
    return [right, 30 - right]


def test_the_held_out_side_pays_and_the_training_side_does_not(tmp_path):
    node = make_node(tmp_path)
    reply, body = ask(node)
    assert {name: len(sums) for name, sums in load(body).items()} == {"metric/accuracy": 2}
    assert node.ledger.entries() == []
    admitted, reserved, committed = node.held_out.ledger.entries()
    assert [entry.state for entry in (admitted, reserved, committed)] == ["ADMITTED", "RESERVED", "COMMITTED"]
    order = float(node.held_out.ledger.genesis.order)
    price = charge_units(SampledGaussian(sampling_rate=1.0, noise_multiplier=2.0, steps=1), order)
    assert int(reserved.rdp_charge) == price
    assert json.loads(admitted.mechanism_text)["units"] == str(3 * price)  # after rounds 4, 8 and 10
    assert (reserved.releases, reserved.charge_id) == ('["metrics"]', reply.charge_id)
    assert (reply.receipt.ledger_id, reply.receipt.hash) == (node.held_out.ledger.genesis.ledger_id, committed.hash)


def test_without_noise_the_sums_are_the_counts(tmp_path):
    sums = load(ask(make_node(tmp_path), OPEN)[1])["metric/accuracy"]
    assert sums.tolist() == truth(OPEN)


def test_the_noise_is_that_of_the_plan(tmp_path):
    """60 models, one charge each: χ² with 120 degrees of freedom; outside [0.5, 1.7] with probability below 1e-5."""
    big = plan(rounds=60, evaluation={"every": 1, "noise_multiplier": 2.0})
    node = make_node(tmp_path, aside_epsilon=1000.0)
    exact = torch.tensor(truth(big), dtype=torch.float32)
    drawn = [load(ask(node, big, round_number=number)[1])["metric/accuracy"] - exact for number in range(1, 61)]
    assert 0.5 < float(torch.stack(drawn).square().mean()) / 4.0 < 1.7


def test_experts_that_stay_are_measured_as_the_node_has_them(tmp_path):
    local = OPEN.model_copy(update={"local_experts": OPEN.model.experts.routed})
    node = make_node(tmp_path)
    sent = {name: tensor for name, tensor in model_of(local).items() if name in local.travelling(HELD)}
    request = TrainRequest(run_id="1", scenario="test", round=3, plan=local, held=HELD)
    node.train(request, encode(request, pack(sent)))
    kept = load(node.ledger.local_state(f"local-experts/1/{local.hash}"))
    sums = load(ask(node, local)[1])["metric/accuracy"].tolist()
    assert sums == truth(local, tensors={**sent, **{name: kept[name] for name in kept if name not in sent}})


@pytest.mark.parametrize("round_number", [1, 3, 5, 9, 11])
def test_a_round_without_an_evaluation_in_the_plan_is_refused(tmp_path, round_number):
    assert refusal(make_node(tmp_path), round_number=round_number) == "bad-request"


def test_the_last_round_has_one(tmp_path):
    node = make_node(tmp_path)
    ask(node, round_number=10)
    assert [entry.round for entry in node.held_out.ledger.entries() if entry.state == "COMMITTED"] == [10]


def test_a_plan_without_evaluation_is_refused(tmp_path):
    assert refusal(make_node(tmp_path), plan()) == "bad-request"


def test_an_owner_must_name_metrics_and_trains_either_way(tmp_path):
    node = make_node(tmp_path, releases={"delta": 1.0})
    assert node.describe().held_out is None
    assert refusal(node) == "not-allowed"
    node.admit(AdmitRequest(run_id="1", scenario="test", plan=PLAN))


def test_a_node_that_holds_nothing_out_trains_and_does_not_evaluate(tmp_path):
    node = replace(make_node(tmp_path), held_out=None)
    assert node.describe().held_out is None
    node.admit(AdmitRequest(run_id="1", scenario="test", plan=PLAN))
    with pytest.raises(ProtocolError) as caught:
        ask(node)
    assert caught.value.code == "not-allowed"


@pytest.mark.parametrize("noise", [0.5, 0.999])
def test_too_little_noise_is_refused(tmp_path, noise):
    asked = plan(evaluation={"every": 4, "noise_multiplier": noise})
    assert refusal(make_node(tmp_path, simulation=False, min_noise_multiplier=1.0), asked) == "not-allowed"


def test_without_privacy_is_refused_outside_simulation(tmp_path):
    assert refusal(make_node(tmp_path, simulation=False), OPEN) == "not-allowed"


def test_a_spent_budget_is_an_orderly_answer_and_training_goes_on(tmp_path):
    node = make_node(tmp_path, aside_epsilon=0.5)
    assert refusal(node) == "budget-exhausted"
    node.admit(AdmitRequest(run_id="1", scenario="test", plan=PLAN))


def test_a_redelivery_gets_the_same_bytes_and_costs_nothing(tmp_path):
    node = make_node(tmp_path)
    first, spent = ask(node), node.held_out.ledger.epsilon_spent
    assert ask(node) == first
    assert node.held_out.ledger.epsilon_spent == spent > 0.0
    assert refusal(node, seed=2) == "already-charged"


def test_the_charge_is_durable_before_a_record_is_looked_at_and_a_crash_draws_the_same_noise(tmp_path, monkeypatch):
    node = make_node(tmp_path / "a")

    def crash(*args):
        assert [entry.state for entry in node.held_out.ledger.entries()] == ["ADMITTED", "RESERVED"]
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(conclave.clients.node, "evaluate", crash)
        with pytest.raises(MemoryError):
            ask(node)
    assert ask(node)[1] == ask(make_node(tmp_path / "b"))[1]


def test_experts_trained_in_between_make_a_crash_unrepeatable(tmp_path, monkeypatch):
    """The second attempt would measure another model with the first one's noise: two releases of one draw."""
    local = OPEN.model_copy(update={"local_experts": OPEN.model.experts.routed})
    node = make_node(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(conclave.clients.node, "evaluate", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ask(node, local)
    request = TrainRequest(run_id="1", scenario="test", round=3, plan=local, held=HELD)
    sent = {name: tensor for name, tensor in model_of(local).items() if name in local.travelling(HELD)}
    node.train(request, encode(request, pack(sent)))
    with pytest.raises(ProtocolError) as caught:
        ask(node, local)
    assert caught.value.code == "charge-abandoned"


def test_no_unit_need_be_held_out(tmp_path):
    """An empty side answers too, with noise: that it is empty must not show otherwise."""
    node = make_node(tmp_path)
    empty = {name: tensor[:0] for name, tensor in node.held_out.records.items()}
    node = replace(node, held_out=replace(node.held_out, records=empty))
    sums = load(ask(node)[1])["metric/accuracy"]
    assert 0.0 < float(sums.norm()) < 20.0


def test_the_receipt_is_of_the_held_out_ledger(tmp_path):
    node = make_node(tmp_path)
    reply, _ = ask(node)
    ask(node, round_number=8, receipt=reply.receipt)
    ledger_id = node.held_out.ledger.genesis.ledger_id
    assert refusal(node, round_number=10, receipt=SignedHead.sign(ASIDE_KEY, ledger_id, 99, "0" * 64)) == (
        "ledger-mismatch"
    )
    other = SignedHead.sign(KEY, node.ledger.genesis.ledger_id, 1, "0" * 64)
    assert refusal(node, round_number=10, receipt=other) == "bad-request"


def test_closing_a_run_frees_what_both_sides_set_aside(tmp_path):
    node = make_node(tmp_path)
    node.admit(AdmitRequest(run_id="1", scenario="test", plan=PLAN))
    ask(node)
    assert node.ledger.units_set_aside > 0
    assert node.held_out.ledger.units_set_aside > 0
    node.close(CloseRequest(run_id="1"))
    assert (node.ledger.units_set_aside, node.held_out.ledger.units_set_aside) == (0, 0)
    assert refusal(node, round_number=8) == "not-allowed"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"split_key": "01"}, "split_key"),
        ({"held_out": "0.5"}, "held_out"),
        ({"dataset_id": "other"}, "dataset_id"),
        ({"unit": "group"}, "unit"),
        ({"side": "training"}, "for training and training"),
    ],
)
def test_two_ledgers_that_divide_the_data_otherwise_are_refused(tmp_path, change, named):
    """A unit could be on both sides: then it would bear both budgets."""
    node = make_node(tmp_path / "a")
    aside = replace(node.held_out.ledger.genesis, **change)
    other = Ledger.create(tmp_path / "other.db", aside, ASIDE_KEY)
    with pytest.raises(BadInputError, match=named):
        replace(node, held_out=HeldOut(held_out_batch(), other))


def test_strict_measures_each_unit_alone_to_the_same_sums(tmp_path):
    privacy = {"mechanism": "none", "epsilon": 8.0, "delta": 1e-5, "clip": 1.0, "sampling_rate": 0.5}
    strict = OPEN.model_copy(update={"privacy": type(OPEN.privacy)(**privacy, numeric="strict")})
    assert load(ask(make_node(tmp_path), strict)[1])["metric/accuracy"].tolist() == truth(OPEN)


def test_what_is_processed_at_once_changes_no_sum(tmp_path, monkeypatch):
    monkeypatch.setattr("conclave.clients.evaluator.room_for", lambda *_: Room(7))
    assert load(ask(make_node(tmp_path), OPEN)[1])["metric/accuracy"].tolist() == truth(OPEN)


def test_a_record_that_the_model_fails_on_scores_nothing_and_the_node_answers(tmp_path, monkeypatch):
    right, units = truth(OPEN)[0], sum(truth(OPEN))
    node, whole, bad = make_node(tmp_path), Network.forward, held_out_batch()["image"][:4]

    def failing(self, batch, *rest):
        if any((batch["image"] == one).flatten(1).all(1).any() for one in bad):
            raise MemoryError("no more")
        return whole(self, batch, *rest)

    monkeypatch.setattr(Network, "forward", failing)
    sums = load(ask(node, OPEN)[1])["metric/accuracy"].tolist()
    assert sum(sums) == units
    assert right - 4 <= sums[0] <= right


def test_a_model_that_fails_on_records_scores_nothing_and_leaks_nothing(tmp_path):
    """NaN scores are an answer like any other; the sums stay whole units."""
    node = make_node(tmp_path)
    sent = {name: torch.full_like(tensor, 1e18) for name, tensor in model_of(OPEN).items()}
    request = EvaluateRequest(run_id="1", scenario="test", round=4, plan=OPEN, held=HELD)
    sums = load(body_of(node.evaluate(request, encode(request, pack(sent)))))["metric/accuracy"]
    assert float(sums.sum()) == 30.0


def test_config_of_the_model_is_checked_like_for_training(tmp_path):
    assert refusal(make_node(tmp_path, max_parameters=10)) == "not-allowed"
    assert refusal(make_node(tmp_path / "b"), held={0: (1,)}) == "bad-request"
    other = make_config()
    other = other.model_copy(update={"head": other.head.model_copy(update={"classes": 7})})
    mismatch = plan(model=other, evaluation={"every": 4, "noise_multiplier": 2.0})
    assert refusal(make_node(tmp_path / "c"), mismatch) == "schema-mismatch"


def test_the_time_of_the_first_evaluation_stands_nowhere(tmp_path, monkeypatch):
    """It comes after rounds of training, whose length follows how many records were drawn."""
    node = make_node(tmp_path)
    monkeypatch.setattr("conclave.privacy.ledger.store.utc_now", lambda: "2030-01-01T00:00:00+00:00")
    node.admit(AdmitRequest(run_id="1", scenario="test", plan=PLAN))
    monkeypatch.setattr("conclave.privacy.ledger.store.utc_now", lambda: "2030-01-01T00:00:13+00:00")
    ask(node)
    node.close(CloseRequest(run_id="1"))
    entries = [*node.ledger.entries(), *node.held_out.ledger.entries()]
    assert [entry.state for entry in entries] == ["ADMITTED", "CLOSED", "ADMITTED", "RESERVED", "COMMITTED", "CLOSED"]
    assert {entry.time for entry in entries} == {"2030-01-01T00:00:00+00:00"}
