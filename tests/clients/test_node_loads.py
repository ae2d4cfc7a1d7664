"""A node that releases expert loads: charged with the gradient, only where its owner allows it."""

from __future__ import annotations

import json

import pytest
from conftest import make_config
from node_samples import HELD, body, code_of, make_node, train
from plan_samples import plan, request

from conclave.clients.policy import Policy
from conclave.privacy.accounting.filter import fixed_order
from conclave.privacy.accounting.mechanisms import SampledGaussian, joint_noise
from conclave.privacy.accounting.prices import charge_units
from conclave.privacy.ledger.reading.history import open_history
from conclave.privacy.ledger.reading.verification import audit_history
from conclave.protocol.codec import unpack

CONFIG = make_config(router={"kind": "sigmoid"})
ALLOWED = {"releases": {"delta": 1.0, "loads": 0.05}}


def asked(**changes):
    return request(held=HELD, plan=plan(model=CONFIG, load_share=0.05, **changes))


def test_loads_leave_with_the_delta_in_one_release_under_one_charge(tmp_path):
    node = make_node(tmp_path, **ALLOWED)
    reply, sent = train(node, asked(), body(config=CONFIG))
    tensors = unpack(sent, asked().plan.reply_shapes(HELD))
    assert tensors["load/0"].shape == (3,)
    assert bool((tensors["load/0"] != 0).all())
    _, reserved, committed = node.ledger.entries()
    assert reserved.releases == '["delta","loads"]'
    mechanism = json.loads(reserved.mechanism_text)
    assert mechanism["sigma"] == "2"
    assert mechanism["parts"].keys() == {"delta", "loads"}
    assert 2.0 <= joint_noise(map(float, mechanism["parts"].values())) <= 2.0 * (1 + 1e-15)
    order = fixed_order(8.0, 1e-5)
    price = charge_units(SampledGaussian(sampling_rate=0.5, noise_multiplier=2.0, steps=1), order)
    assert int(reserved.rdp_charge) == price  # the same as without loads: only the noise is divided otherwise
    assert audit_history(open_history(tmp_path / "ledger.db")).findings == []
    assert train(node, asked(), body(config=CONFIG)) == (reply, sent)
    assert committed.hash == reply.receipt.hash


def test_loads_that_the_owner_did_not_allow_are_refused_and_cost_nothing(tmp_path):
    assert "loads" not in Policy().releases
    for number, releases in enumerate(({"delta": 1.0}, {"delta": 1.0, "loads": 0.049}, {"delta": 0.9, "loads": 1.0})):
        folder = tmp_path / str(number)
        folder.mkdir()
        node = make_node(folder, releases=releases)
        assert code_of(node, asked(), body(config=CONFIG)) == "not-allowed"


def test_training_leaves_the_node_only_as_was_asked(tmp_path):
    """Without a share there is no load, and the very same bytes as before loads existed."""
    node = make_node(tmp_path, **ALLOWED)
    _, sent = train(node, request(held=HELD, plan=plan(model=CONFIG)), body(config=CONFIG))
    assert not any(name.startswith("load") for name in unpack(sent, plan(model=CONFIG).reply_shapes(HELD)))
    assert "parts" not in node.ledger.entries()[1].mechanism_text


def test_loads_of_a_replay_are_the_same_bits(tmp_path, monkeypatch):
    node = make_node(tmp_path, **ALLOWED)
    with monkeypatch.context() as patch:
        patch.setattr("conclave.clients.node.release", lambda *args: (_ for _ in ()).throw(MemoryError("late")))
        with pytest.raises(MemoryError):
            train(node, asked(), body(config=CONFIG))
    after_crash = train(node, asked(), body(config=CONFIG))[1]
    (tmp_path / "undisturbed").mkdir()
    assert train(make_node(tmp_path / "undisturbed", **ALLOWED), asked(), body(config=CONFIG))[1] == after_crash


def test_the_share_of_a_choice_is_among_the_experts_held(tmp_path):
    """With next to no noise, the loads of 40 records sum to K times 40: nothing was chosen that is not there."""
    node = make_node(tmp_path, epsilon=1e6, releases={"delta": 1.0, "loads": 0.5})
    privacy = {"epsilon": 1e6, "delta": 1e-5, "clip": 1.0, "sampling_rate": 1.0}
    quiet = request(
        held=HELD, plan=plan(model=CONFIG, load_share=0.5, noise_multiplier=0.02, privacy=privacy, rounds=1)
    )
    _, sent = train(node, quiet, body(config=CONFIG))
    loads = unpack(sent, quiet.plan.reply_shapes(HELD))["load/0"]
    assert float(loads.sum()) == pytest.approx(80.0, abs=6 * 0.04 * 3**0.5)
    assert bool((loads > -1).all())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"load_share": 0.6}, "less than or equal to 0.5"),
        ({"load_share": -0.1}, "greater than or equal to 0"),
        ({"load_share": 1e-5}, "must be 0 or at least 0.0001"),
        ({"load_share": float("nan")}, "finite"),
        ({"load_share": 0.1, "noise_multiplier": None}, "must be 0 without privacy"),
        ({"load_share": 0.1, "model": CONFIG.model_dump() | {"preset": "own", "source": "a:b"}}, "of the user's own"),
    ],
)
def test_a_plan_that_cannot_be_is_none(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        plan(**changes)


def test_a_plan_without_loads_has_the_hash_it_had():
    assert plan(load_share=0.0).hash == plan().hash != plan(load_share=0.05).hash
    assert "load_share" not in plan().json_for_hash()
