"""Deep and gated experts against a loop over rows and experts; the deep-moe preset."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make_batch, make_config
from family_samples import FAMILY, make_deep_config
from pydantic import ValidationError
from torch.func import functional_call

from conclave.model import parameters
from conclave.model.building import build, from_state
from conclave.model.config import ModelConfig
from conclave.model.experts.stacked import RoutedExperts, SharedExpert
from conclave.model.store import load, save_model

SIZES = [2, 0, 3, 1]
ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "relu": lambda x: x * (x > 0),
    "tanh": lambda x: (torch.exp(x) - torch.exp(-x)) / (torch.exp(x) + torch.exp(-x)),
}


def hidden(layer, row, activation, matrix):
    """One hidden layer of one row; ``matrix(map)`` is the map's matrix, to be multiplied from the right."""
    up = row @ matrix(layer.up)
    if activation == "swiglu":
        gate = row @ matrix(layer.gate)
        return gate / (1.0 + torch.exp(-gate)) * up
    return ACTIVATIONS[activation](up)


def loop(network, row, activation, matrix):
    row = hidden(network, row, activation, matrix)
    for layer in network.between:
        row = hidden(layer, row, activation, matrix)
    return row @ matrix(network.down)


def filled(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return module.double()


def dispatched():
    offsets = torch.tensor(SIZES).cumsum(0).to(torch.int32)
    return offsets, torch.tensor([0, 1, 0, 1, 1, 0]), torch.arange(2)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "swiglu"])
def test_routed_experts_equal_a_loop(activation, depth):
    experts = filled(RoutedExperts(make_config(activation=activation, depth=depth, hidden=16).experts, 4, 8))
    rows = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    of = [expert for expert, size in enumerate(SIZES) for _ in range(size)]
    expected = torch.stack(
        [loop(experts, row, activation, lambda m, e=e: m.weight[e]) for row, e in zip(rows, of, strict=True)]
    )
    got = experts(rows, *dispatched())
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    inputs = [rows, *experts.parameters()]
    pairs = [torch.autograd.grad(y.sin().sum(), inputs) for y in (got, expected)]
    for mine, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    assert len(list(experts.parameters())) == (2 * depth if activation == "swiglu" else depth) + 1
    assert not pairs[0][1][1].any()  # the expert without rows


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "swiglu"])
def test_the_shared_expert_equals_a_loop(activation, depth):
    shared = filled(SharedExpert(make_config(activation=activation, depth=depth, shared=2).experts, 8))
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    expected = torch.stack([torch.stack([loop(shared, row, activation, lambda m: m.weight.T) for row in t]) for t in x])
    torch.testing.assert_close(shared(x), expected, rtol=1e-10, atol=1e-10)
    assert shared.down.in_features == 2 * 8


def test_gradcheck():
    experts = filled(RoutedExperts(make_config(activation="swiglu", depth=2).experts, 4, 3))
    names = [name for name, _ in experts.named_parameters()]

    def f(rows, *weights):
        return functional_call(experts, dict(zip(names, weights, strict=True)), (rows, *dispatched()))

    rows = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    # An undefined (None) incoming gradient never reaches the layer: every consumer of its rows is differentiable.
    assert torch.autograd.gradcheck(f, (rows, *experts.parameters()), check_undefined_grad=False)


@pytest.mark.parametrize("name", FAMILY)
def test_every_weight_is_drawn_with_the_documented_scale(name):
    network = build(FAMILY[name], seed=4)
    for key, weight in network.named_parameters():
        assert weight.isfinite().all(), key
        if weight.dim() < 2 or "table" in key or "position" in key:
            continue
        fan_in = math.prod(weight.shape[1:]) if "convolutions" in key else weight.shape[1]  # experts are stacked
        if "vectors" in key:
            fan_in = 1  # each value has a vector of its own
        # The relative error of a normal sample's deviation is 1/√(2n); a false alarm at 6 of them: 2e-9 a tensor.
        deviation = float(weight.detach().double().std()) * math.sqrt(fan_in)
        assert deviation == pytest.approx(1.0, rel=6.0 / math.sqrt(2 * weight.numel())), key


@pytest.mark.parametrize("name", FAMILY)
def test_gains_reach_the_maps_they_name(name):
    config = FAMILY[name].model_copy(update={"init": FAMILY[name].init.model_copy(update={"up": 3.0, "down": 0.5})})
    plain, scaled = build(FAMILY[name], seed=4), build(config, seed=4)
    for (key, a), b in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        expert = any(part in key for part in (".experts.", ".shared.", "feed_forward."))
        gain = (0.5 if key.endswith("down.weight") else 3.0) if expert else 1.0
        torch.testing.assert_close(b, gain * a, rtol=1e-6, atol=0)


def test_copies_are_copies_in_every_map():
    config = make_deep_config(activation="swiglu")
    network = build(config.model_copy(update={"init": config.init.model_copy(update={"experts": "copies"})}), seed=4)
    maps = {name: p for name, p in network.named_parameters() if ".experts." in name}
    assert len(maps) == 2 * 5
    for weight in maps.values():
        assert torch.equal(weight, weight[:1].expand_as(weight))


@pytest.mark.parametrize("name", FAMILY)
def test_names_on_the_wire_and_on_disk_keep_every_bit(name, tmp_path):
    config = FAMILY[name]
    network = build(config, seed=4)
    wire = parameters.split(network.state_dict(), network.held)
    assert {n: t.shape for n, t in wire.items()} == parameters.shapes(config, config.all_experts)
    back = parameters.join(wire, network.held)
    assert back.keys() == network.state_dict().keys()
    assert all(torch.equal(tensor, back[n]) for n, tensor in network.state_dict().items())
    save_model(tmp_path, config, wire)
    batch = network.synthetic_batch(3)
    assert torch.equal(load(tmp_path).loss(batch), network.loss(batch))


def test_a_deep_gated_expert_travels_as_itself():
    config = make_deep_config(activation="swiglu")
    wire = parameters.split(build(config, seed=4).state_dict(), config.all_experts)
    mine = {name.rpartition("/")[2] for name in wire if name.startswith("expert/1/5/")}
    assert mine == {f"{name}.weight" for name in ("up", "gate", "between.0.up", "between.0.gate", "down")}
    held = {0: (1, 4), 1: (0, 5)}
    part = from_state(config, held, parameters.join(wire, held))
    mask = {layer: torch.tensor([e in held[layer] for e in range(6)]) for layer in held}
    batch = make_batch(5)
    torch.testing.assert_close(part(batch).scores, build(config, seed=4)(batch, mask).scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layers": 1}, "model.layers is 1, must be at least 2 for preset deep-moe"),
        ({"experts": {"routed": 4, "hidden": 8}}, "model.experts.depth is 1, must be at least 2 for preset deep-moe"),
        ({"attention": {"heads": 2}}, "model.preset deep-moe has no attention, must be transformer"),
        ({"preset": "moe"}, "model.preset moe has one layer and no attention, must be transformer, or deep-moe"),
        ({"experts": {"routed": 4, "hidden": 8, "depth": 0}}, "greater than or equal to 1"),
        ({"experts": {"routed": 4, "hidden": 8, "depth": 17}}, "less than or equal to 16"),
    ],
)
def test_what_is_no_deep_moe_is_refused(changes, sentence):
    with pytest.raises(ValidationError, match=sentence.replace(".", r"\.")):
        ModelConfig.model_validate(make_deep_config().model_dump(exclude_none=True) | changes)


def test_bytes_without_attention_are_refused():
    document = make_deep_config().model_dump(exclude_none=True)
    document |= {"encoder": {"kind": "bytes", "window": 8}, "head": {"kind": "next-byte"}}
    with pytest.raises(ValidationError, match=r"model\.preset is deep-moe, must be transformer for bytes"):
        ModelConfig.model_validate(document)


def test_a_deep_moe_learns():
    network, batch = build(make_deep_config(), seed=4), make_batch(32)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    first = float(network.loss(batch).mean().detach())
    for _ in range(60):
        optimizer.zero_grad()
        loss = network.loss(batch).mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5 * first
