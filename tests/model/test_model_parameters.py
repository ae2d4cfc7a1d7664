"""Wire names: a lossless renaming that keeps global expert ids."""

from __future__ import annotations

import pytest
import torch
from conftest import make_config
from hypothesis import given, settings
from hypothesis import strategies as st

from conclave.model import parameters
from conclave.model.building import build, from_state
from conclave.model.network import Network

SETTINGS = settings(max_examples=50, deadline=None, derandomize=True, database=None)
ids = st.sets(st.integers(0, 40), min_size=1, max_size=6).map(lambda s: tuple(sorted(s)))
layouts = st.lists(ids, min_size=1, max_size=3).map(lambda layers: dict(enumerate(layers)))


def numbered_state(held):
    """A state dict in which every row says to which layer and expert it belongs."""
    state = {"head.score.weight": torch.rand(3, 4), "blocks.0.norm.weight": torch.rand(4)}
    for layer, experts in held.items():
        mark = torch.tensor([1000.0 * layer + e for e in experts])
        state[f"blocks.{layer}.moe.router.score.weight"] = mark[:, None].repeat(1, 4)
        state[f"blocks.{layer}.moe.experts.up.weight"] = mark[:, None, None].repeat(1, 4, 2)
        state[f"blocks.{layer}.moe.experts.down.weight"] = -mark[:, None, None].repeat(1, 2, 4)
        state[f"blocks.{layer}.moe.shared.up.weight"] = torch.rand(2, 4)
    return state


@SETTINGS
@given(layouts)
def test_split_and_join_are_inverse_and_names_are_global(held):
    state = numbered_state(held)
    wire = parameters.split(state, held)
    for layer, experts in held.items():
        for e in experts:
            mark = 1000.0 * layer + e
            assert wire[f"router/{layer}/{e}/score.weight"].tolist() == [mark] * 4
            assert wire[f"expert/{layer}/{e}/up.weight"].tolist() == [[mark] * 2] * 4
            assert wire[f"expert/{layer}/{e}/down.weight"].tolist() == [[-mark] * 4] * 2
        assert torch.equal(wire[f"shared/blocks.{layer}.moe.shared.up.weight"], numbered(state, layer))
    assert len(wire) == 2 + sum(1 + 3 * len(experts) for experts in held.values())
    back = parameters.join(wire, held)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def numbered(state, layer):
    return state[f"blocks.{layer}.moe.shared.up.weight"]


@SETTINGS
@given(layouts, st.data())
def test_select_and_join_give_a_holder_exactly_its_part(held, data):
    wire = parameters.split(numbered_state(held), held)
    part = {
        layer: tuple(sorted(data.draw(st.sets(st.sampled_from(experts), min_size=1))))
        for layer, experts in held.items()
    }
    chosen = parameters.select(wire, part)
    shared = {name for name in wire if name.startswith("shared/")}
    own = {
        name
        for layer, experts in part.items()
        for e in experts
        for name in (
            f"router/{layer}/{e}/score.weight",
            f"expert/{layer}/{e}/up.weight",
            f"expert/{layer}/{e}/down.weight",
        )
    }
    assert set(chosen) == shared | own
    assert len(chosen) == len(set(chosen))
    state = parameters.join({name: wire[name] for name in chosen}, part)
    expected = numbered_state(part)
    assert state.keys() == expected.keys()
    for name in expected:
        if ".experts." in name or ".router." in name:
            assert torch.equal(state[name], expected[name])


def test_select_without_a_layer_sends_none_of_its_experts():
    names = ["shared/a", "expert/0/1/up.weight", "expert/1/1/up.weight", "router/1/1/score.weight"]
    assert parameters.select(names, {1: (1,)}) == ["shared/a", "expert/1/1/up.weight", "router/1/1/score.weight"]


def test_join_without_a_held_expert_is_a_key_error():
    held = {0: (2, 7)}
    wire = parameters.split(numbered_state(held), held)
    del wire["expert/0/7/up.weight"]
    with pytest.raises(KeyError):
        parameters.join(wire, held)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("shared/head.score.weight", ("shared", None, None)),
        ("router/0/17/score.weight", ("router", 0, 17)),
        ("expert/3/0/up.weight", ("expert", 3, 0)),
    ],
)
def test_owner(name, expected):
    assert parameters.owner(name) == expected


@pytest.mark.parametrize(
    "name",
    [
        "",
        "shared",
        "shared/",
        "expert",
        "expert/0/1",
        "expert/0/1/",
        "expert//1/up",
        "expert/0//up",
        "expert/-1/1/up",
        "expert/0/x/up",
        "expert/0/1.0/up",
        "expert/0/ 1/up",
        "expert/0/²/up",
        "expert/0/1/2/up",
        "Expert/0/1/up",
        "experts/0/1/up",
        "/expert/0/1/up",
        "head.score.weight",
    ],
)
def test_owner_refuses_what_is_no_wire_name(name):
    with pytest.raises(ValueError, match="not a parameter name"):
        parameters.owner(name)


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("held", [{0: (1, 3, 4)}, {0: (0, 5)}, {0: tuple(range(6))}])
def test_shapes_are_those_of_a_real_state(held, shared):
    config = make_config(shared=shared)
    wire = parameters.split(Network(config, held).state_dict(), held)
    assert parameters.shapes(config, held) == {name: tensor.shape for name, tensor in wire.items()}
    full = parameters.split(build(config, 1).state_dict(), config.all_experts)
    assert set(parameters.shapes(config, held)) == set(parameters.select(full, held))


def test_a_part_of_a_real_model_keeps_its_bits(config):
    full = build(config, 1)
    wire = parameters.split(full.state_dict(), full.held)
    held = {0: (1, 4)}
    part = from_state(config, held, parameters.join(wire, held))
    again = parameters.split(part.state_dict(), held)
    assert set(again) < set(wire)
    assert all(torch.equal(again[name], wire[name]) for name in again)
