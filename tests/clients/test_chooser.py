"""A node's choice of experts: utilities by hand, over all neighbours, and nothing but an order in what is released."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import make_batch, make_config, make_text, make_text_config
from plan_samples import plan

from conclave.clients.chooser import choice, choice_shapes, utilities
from conclave.model import parameters
from conclave.model.building import build
from conclave.model.network import Network
from conclave.privacy.gradients.physical_batch import Room
from conclave.protocol.charges import charges_of

AFFINITY = {"epsilon": 0.5, "every": 2, "experts": 3}


def asked(**changes):
    return plan(affinity=AFFINITY, **changes)


def sent(of, seed=3):
    network = build(of.model, seed)
    wire = parameters.split(network.state_dict(), network.held)
    return {name: wire[name] for name in of.choosing_shapes}


def by_hand(of, tensors, records):
    """Run each record alone through a model whose experts are zero, and count."""
    shapes = parameters.shapes(of.model, of.model.all_experts)
    whole = {name: tensors.get(name, torch.zeros(shape)) for name, shape in shapes.items()}
    network = build(of.model, 0)
    network.load_state_dict(parameters.join(whole, of.model.all_experts))
    network.eval()
    totals = torch.zeros(of.model.layers, of.model.experts.routed, dtype=torch.float64)
    for number in range(len(next(iter(records.values())))):
        output = network({name: tensor[number : number + 1] for name, tensor in records.items()})
        for layer, routing in enumerate(output.routing):
            for token in routing.experts_BTK[0]:
                for expert in token:
                    totals[layer, expert] += 1.0 / len(routing.experts_BTK[0])
    return totals


@pytest.mark.parametrize(
    ("of", "records"),
    [
        (asked(), make_batch(23)),
        (asked(model=make_text_config(layers=2)), {"text": make_text(9)["text"]}),
    ],
    ids=["one layer", "two layers"],
)
def test_worths_are_shares_of_tokens_added_up(of, records):
    got = torch.stack(utilities(of, sent(of), records))
    torch.testing.assert_close(got, by_hand(of, sent(of), records), atol=1e-6, rtol=0)
    strict = of.model_copy(update={"privacy": of.privacy.model_copy(update={"numeric": "strict"})})
    torch.testing.assert_close(torch.stack(utilities(strict, sent(of), records)), got, atol=1e-6, rtol=0)


def test_no_unit_moves_a_worth_by_more_than_one_over_all_neighbours_of_small_data_sets():
    of, records = asked(), make_batch(5)
    tensors = sent(of)
    sums = {}
    for size in range(1, 6):
        for subset in itertools.combinations(range(5), size):
            part = {name: tensor[list(subset)] for name, tensor in records.items()}
            sums[subset] = torch.stack(utilities(of, tensors, part))
    moves = [
        float((total - sums[tuple(other for other in subset if other != left)]).abs().max())
        for subset, total in sums.items()
        if len(subset) > 1
        for left in subset
    ]
    assert max(moves) <= 1.0
    assert max(moves) == pytest.approx(1.0)  # images are one token here: a choice is a whole


def test_a_group_counts_once_whatever_it_holds():
    privacy = {
        "epsilon": 8.0, "delta": 1e-5, "clip": 1.0, "sampling_rate": 0.5, "unit": "group", "records_per_unit": 8,
    }  # fmt: skip
    of = asked(privacy=privacy)
    records = {**make_batch(8), "group": torch.tensor([5] * 6 + [9] * 2)}
    total = torch.stack(utilities(of, sent(of), records))
    assert float(total.sum()) == pytest.approx(2 * of.model.experts.top_k, abs=1e-6)


def test_a_group_that_comes_in_parts_counts_as_it_does_whole(monkeypatch):
    privacy = {
        "epsilon": 8.0, "delta": 1e-5, "clip": 1.0, "sampling_rate": 0.5, "unit": "group", "records_per_unit": 8,
    }  # fmt: skip
    of = asked(privacy=privacy)
    records = {**make_batch(8), "group": torch.tensor([5] * 6 + [9] * 2)}
    whole = utilities(of, sent(of), records)
    seen = rooms_of(monkeypatch, 2)
    assert all(map(torch.equal, whole, utilities(of, sent(of), records)))
    assert seen == [2, 2, 2, 2]  # the group of two, then the six in parts


def test_a_record_that_the_model_fails_on_counts_as_nothing(monkeypatch):
    of, records = asked(), make_batch(6)
    total = torch.stack(utilities(of, sent(of), records))
    whole = Network.forward
    bad = records["image"][3].clone()

    def failing(self, batch):
        if (batch["image"] == bad).flatten(1).all(1).any():
            raise MemoryError("no more")
        return whole(self, batch)

    monkeypatch.setattr(Network, "forward", failing)
    others = {name: tensor[[0, 1, 2, 4, 5]] for name, tensor in records.items()}
    without = torch.stack(utilities(of, sent(of), records))
    assert torch.equal(without, torch.stack(utilities(of, sent(of), others)))
    assert float((total - without).sum()) == pytest.approx(of.model.experts.top_k, abs=1e-6)


def rooms_of(monkeypatch, examples):
    """Let so many examples be processed at once; return how many were, pass by pass."""
    seen, whole = [], Network.forward

    def watched(self, batch):
        seen.append(len(batch["label"]))
        return whole(self, batch)

    monkeypatch.setattr(Network, "forward", watched)
    monkeypatch.setattr("conclave.clients.chooser.room_for", lambda *_: Room(examples))
    return seen


def test_only_an_order_is_released_and_it_is_what_the_bounds_say():
    of = asked()
    for capacity, count in ((6, 3), (2, 2)):
        released = choice(of, sent(of), make_batch(10), capacity, bytes(32))
        assert {name: tensor.shape for name, tensor in released.items()} == choice_shapes(of, capacity)
        ids = released["choice/0"].tolist()
        assert len(ids) == count == len(set(ids))
        assert set(ids) <= set(map(float, range(6)))
    same = [choice(of, sent(of), make_batch(10), 3, b"\3" * 32)["choice/0"] for _ in range(2)]
    assert torch.equal(*same)  # the charge's secret alone decides: a crash repeats it


def test_layers_choose_independently():
    """Next to no ε: both layers' orders are uniform. Ten coincidences of two orders of four: 2e-14."""
    of = plan(affinity={**AFFINITY, "epsilon": 1e-9, "experts": 4}, model=make_text_config(layers=2))
    records = {"text": make_text(4)["text"]}
    assert of.model.experts.routed == 4
    orders = [choice(of, sent(of), records, 4, bytes([number]) * 32) for number in range(10)]
    assert not all(torch.equal(chosen["choice/0"], chosen["choice/1"]) for chosen in orders)
    assert charges_of(of)["choose"].mechanism.choices == 8


def test_exploration_does_not_show_in_a_worth():
    of = asked(model=make_config(router={"kind": "softmax", "noise": 5.0}))
    records = make_batch(12)
    torch.testing.assert_close(
        torch.stack(utilities(of, sent(of), records)), by_hand(of, sent(of), records), atol=1e-6, rtol=0
    )


def test_with_much_epsilon_the_most_useful_come_first():
    of = plan(affinity={**AFFINITY, "epsilon": 10.0})
    records = make_batch(500)
    utility_E = utilities(of, sent(of), records)[0]
    best = utility_E.argsort(descending=True)[:3].tolist()
    assert choice(of, sent(of), records, 6, bytes(32))["choice/0"].tolist() == best


def test_the_charge_names_every_choice_and_not_before_round_two():
    of = asked()
    assert charges_of(of)["choose"].mechanism.choices == 3
    assert [number for number in range(1, 8) if of.affinity.due(number)] == [3, 5, 7]
    assert of.affinity.count(7) == 3
    assert of.affinity.count(6) == 2
    assert asked().hash != plan().hash


def test_no_expert_travels_for_a_choice():
    of = asked()
    assert not [name for name in of.choosing_shapes if name.startswith("expert/")]
    routers = {parameters.owner(name).expert for name in of.choosing_shapes if name.startswith("router/")}
    assert routers == set(range(6))
