"""The MoE layer and the whole network against naive per-token loops; examples do not touch each other."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make_batch, make_config
from naive_models import naive_moe

from conclave.base.errors import BadInputError
from conclave.model import parameters
from conclave.model.building import build, from_state
from conclave.model.config import ModelConfig
from conclave.model.encoders.config import ImagePatchConfig
from conclave.model.encoders.tokens import ImagePatchEncoder
from conclave.model.experts.config import HeldExperts
from conclave.model.experts.moe import MoELayer


def make_layer(config, dtype):
    layer = MoELayer(config, range(config.routed), 16).to(dtype)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
    x_BTD = torch.randn(3, 4, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return layer, x_BTD


@pytest.mark.parametrize("activation", ["gelu", "relu", "tanh"])
@pytest.mark.parametrize(("top_k", "shared", "mask"), [(1, 0, "111111"), (2, 1, "011010"), (3, 2, "111111")])
def test_layer_equals_a_loop_over_tokens_forward_and_backward(activation, top_k, shared, mask):
    config = make_config(activation=activation, top_k=top_k, shared=shared).experts
    allowed = torch.tensor([c == "1" for c in mask])
    layer, x_BTD = make_layer(config, torch.float64)
    inputs = [x_BTD, *layer.parameters()]

    def value_and_gradients(y_BTD, aux_B):
        weights = torch.linspace(-1.0, 1.0, y_BTD.numel(), dtype=y_BTD.dtype).view_as(y_BTD)
        total = (y_BTD * weights).sum() + aux_B.sum()
        return torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)

    y_BTD, routing = layer(x_BTD, allowed)
    naive_y, naive_aux = naive_moe(layer, x_BTD, allowed, config)
    torch.testing.assert_close(y_BTD, naive_y, rtol=0, atol=1e-12)
    torch.testing.assert_close(routing.aux_B, naive_aux, rtol=0, atol=1e-12)
    got, expected = value_and_gradients(y_BTD, routing.aux_B), value_and_gradients(naive_y, naive_aux)
    for mine, naive in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, naive, rtol=0, atol=1e-11)


def test_layer_in_float32_equals_the_loop():
    config = make_config().experts
    layer, x_BTD = make_layer(config, torch.float32)
    y_BTD, _ = layer(x_BTD, torch.ones(6, dtype=torch.bool))
    naive_y, _ = naive_moe(layer, x_BTD, [True] * 6, config)
    torch.testing.assert_close(y_BTD, naive_y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["rms", "none"])
def test_training_loss_equals_the_formula_written_out(norm):
    config = make_config().model_copy(update={"norm": norm})
    network, batch = build(config, 1).double(), make_batch(3)
    batch = {"image": batch["image"].double(), "label": batch["label"]}
    state = network.state_dict()

    def norm_of(x, weight):
        if norm == "none":
            return x
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float64).eps).sqrt() * state[weight]

    for b in range(3):
        image = batch["image"][b, 0]
        patches = [image[r : r + 4, c : c + 4].flatten() for r in (0, 4) for c in (0, 4)]
        x_TD = torch.stack(patches) @ state["encoder.embed.weight"].T + state["encoder.position.weight"]
        layer = network.blocks[0].moe
        y, aux = naive_moe(layer, norm_of(x_TD, "blocks.0.norm.weight")[None], [True] * 6, config.experts)
        pooled = norm_of(x_TD + y[0], "norm.weight").sum(0) / 4
        scores = state["head.score.weight"] @ pooled
        cross_entropy = scores.exp().sum().log() - scores[batch["label"][b]]
        expected = cross_entropy + 0.1 * aux[0]
        assert network.loss(batch)[b].item() == pytest.approx(expected.item(), abs=1e-10)


@pytest.mark.parametrize("held", [(1, 3, 4), (0, 5), (0, 1, 2, 3, 4, 5)])
def test_holding_a_subset_equals_masking_the_full_model(held):
    config, batch = make_config(), make_batch(9)
    full = build(config, 1)
    wire = parameters.split(full.state_dict(), full.held)
    part = from_state(config, {0: held}, parameters.join(wire, {0: held}))
    mask = torch.tensor([e in held for e in range(6)])
    a, b = part(batch), full(batch, allowed={0: mask})
    torch.testing.assert_close(a.scores, b.scores, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(a.aux_B, b.aux_B, rtol=1e-6, atol=1e-6)
    assert torch.equal(torch.tensor(held)[a.routing[0].experts_BTK], b.routing[0].experts_BTK)


def losses_and_gradients(network, batch, example):
    loss_B = network.loss(batch)
    return loss_B[example].detach(), torch.autograd.grad(loss_B[example], list(network.parameters()))


def surroundings(kind):
    """A batch that holds ``make_batch(6)``'s example 2 at the returned place."""
    batch = make_batch(6)
    me = {name: tensor[2:3] for name, tensor in batch.items()}
    other = make_batch(6, seed=99)
    if kind == "alone":
        return me, 0
    if kind == "replaced":
        joined = {n: torch.cat([other[n][:2], me[n], other[n][2:]]) for n in me}
        return joined, 2
    if kind == "copies":
        return {n: t.repeat(5, *[1] * (t.dim() - 1)) for n, t in me.items()}, 4
    if kind == "extreme":
        huge = {"image": other["image"] * 1e4 - 5e3, "label": other["label"]}
        return {n: torch.cat([huge[n], me[n]]) for n in me}, 6
    return {n: torch.cat([batch[n], other[n]]) for n in me}, 2  # added


@pytest.mark.parametrize("kind", ["alone", "added", "replaced", "copies", "extreme"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_loss_and_gradient_of_an_example_do_not_depend_on_the_others(kind, top_k):
    network = build(make_config(top_k=top_k, balance=1.0), 1)
    loss, gradients = losses_and_gradients(network, make_batch(6), 2)
    assert any(g.any() for g in gradients)
    batch, place = surroundings(kind)
    other_loss, other_gradients = losses_and_gradients(network, batch, place)
    torch.testing.assert_close(other_loss, loss, rtol=0, atol=1e-6)
    for a, b in zip(other_gradients, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_forward_and_backward_change_no_state(config, training):
    network, batch = build(config, 1).train(training), make_batch(5)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert list(network.buffers()) == []
    first = network.loss(batch)
    first.sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert torch.equal(network.loss(batch), first)


def test_patches_come_in_reading_order():
    config = ImagePatchConfig(height=4, width=6, channels=2, patch=2)
    encoder = ImagePatchEncoder(config, width=8)
    with torch.no_grad():
        encoder.embed.weight.copy_(torch.eye(8))
        encoder.position.weight.copy_(torch.arange(6.0)[:, None] * 1000)
    image = torch.arange(48.0).view(1, 2, 4, 6)
    tokens = encoder(image)
    assert tokens.shape == (1, 6, 8)
    place = 0
    for row in (0, 2):
        for column in (0, 2, 4):
            values = [image[0, c, row + i, column + j] for c in (0, 1) for i in (0, 1) for j in (0, 1)]
            assert tokens[0, place].tolist() == [float(v) + 1000 * place for v in values]
            place += 1


def test_values_enter_centred_and_scaled():
    config = ImagePatchConfig(height=2, width=2, patch=2, center=3.0, scale=0.5)
    encoder = ImagePatchEncoder(config, width=4)
    with torch.no_grad():
        encoder.embed.weight.copy_(torch.eye(4))
    image = torch.tensor([[[[3.0, 4.0], [2.0, 0.0]]]])
    assert encoder(image).tolist() == [[[0.0, 2.0, -2.0, -6.0]]]


@pytest.mark.parametrize("shape", [(3, 1, 8, 9), (3, 2, 8, 8), (3, 8, 8), (3, 64), (2, 3, 1, 8, 8)])
def test_images_of_another_shape_are_bad_input(config, shape):
    with pytest.raises(BadInputError, match=r"must be \[1, 8, 8\]") as caught:
        build(config, 1)({"image": torch.zeros(shape)})
    assert str(list(shape[1:])) in str(caught.value)


def test_build_follows_its_seed_and_nothing_else(config):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = build(config, 5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)  # nor does it use up public randomness
    torch.manual_seed(2)
    again, other = build(config, 5).state_dict(), build(config, 6).state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    drawn = [name for name in one if "norm" not in name]
    assert len(drawn) == 8
    assert not any(torch.equal(one[name], other[name]) for name in drawn)


def test_initial_weights_have_the_documented_scales():
    gains = {"embed": 0.5, "router": 2.0, "up": 3.0, "down": 0.25, "head": 1.5}
    config = wide_config(init=gains)
    state = build(config, 1).state_dict()
    fan_in_and_gain = {
        "encoder.embed.weight": (16, 0.5),
        "blocks.0.moe.router.score.weight": (64, 2.0),
        "blocks.0.moe.experts.up.weight": (64, 3.0),
        "blocks.0.moe.experts.down.weight": (128, 0.25),
        "blocks.0.moe.shared.up.weight": (64, 3.0),
        "blocks.0.moe.shared.down.weight": (256, 0.25),
        "head.score.weight": (64, 1.5),
    }
    for name, (fan_in, gain) in fan_in_and_gain.items():
        weight = state[name].double()
        # The relative error of a normal sample's deviation is 1/√(2n); a false alarm at 6 of them: 2e-9 a tensor.
        expected, slack = gain / math.sqrt(fan_in), 6.0 / math.sqrt(2 * weight.numel())
        assert weight.std().item() == pytest.approx(expected, rel=slack), name
    assert state["encoder.position.weight"].std().item() == pytest.approx(0.02, rel=0.4)
    for name in ("norm.weight", "blocks.0.norm.weight"):
        assert torch.equal(state[name], torch.ones(64))


@pytest.mark.parametrize("experts", ["independent", "copies"])
def test_experts_start_alike_only_when_asked_to(experts):
    state = build(wide_config(init={"experts": experts}), 1).state_dict()
    for name in ("blocks.0.moe.experts.up.weight", "blocks.0.moe.experts.down.weight"):
        assert [torch.equal(state[name][0], state[name][e]) for e in range(1, 6)] == [experts == "copies"] * 5
    rows = state["blocks.0.moe.router.score.weight"]
    assert len({tuple(row.tolist()) for row in rows}) == 6  # equal rows could never part


def wide_config(**changes) -> ModelConfig:
    document = make_config(hidden=128, shared=2).model_dump() | {"width": 64} | changes
    return ModelConfig.model_validate(document)


def test_from_state_refuses_tensors_that_do_not_fit(config):
    network = build(config, 1)
    state = network.state_dict()
    held: HeldExperts = {0: (0, 1, 2)}
    with pytest.raises(RuntimeError):
        from_state(config, held, state)
    with pytest.raises(RuntimeError):
        from_state(config, network.held, {k: v for k, v in state.items() if k != "head.score.weight"})
    with pytest.raises(RuntimeError):
        from_state(config, network.held, state | {"extra": torch.ones(1)})
