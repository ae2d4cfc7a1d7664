"""Padding changes nothing, whatever it holds: not a score, not a loss, not a gradient."""

from __future__ import annotations

import pytest
import torch
from conftest import make_batch, make_config, make_text, make_text_config
from family_samples import LATENT, make_image_transformer
from microbatches import alone, relative_error

from conclave.base.errors import BadInputError
from conclave.model.attention.config import LatentConfig, MultiHeadConfig
from conclave.model.attention.latent import LatentAttention
from conclave.model.attention.multi_head import MultiHeadAttention
from conclave.model.building import build
from conclave.model.config import ModelConfig
from conclave.model.layers.padding import mean_over_present, present_tokens
from conclave.privacy.bookkeeping import Bookkeeper, Units

LENGTH_B = torch.tensor([12, 7, 3, 2, 1])
ATTENTIONS = {"multi-head": {"heads": 2}, "latent": LATENT | {"query_rank": 5}}
FILLS = [float("nan"), float("inf"), 0.0, 1e30]


def text_config(attention, after_next=0.5) -> ModelConfig:
    experts = {"routed": 4, "shared": 1, "hidden": 8, "top_k": 2, "balance": 0.0}
    head = {"kind": "next-byte", "after_next": after_next}
    return make_text_config(attention=ATTENTIONS[attention], experts=experts, head=head)


def padded_text(fill=-1):
    text = make_text(5)["text"].long()
    text[torch.arange(12) >= LENGTH_B[:, None]] = fill  # no byte: whoever looked it up would raise
    return {"text": text, "length": LENGTH_B}


def make_attention(kind, causal):
    if kind == "latent":
        return LatentAttention(LatentConfig(**ATTENTIONS["latent"], causal=causal), 8)
    return MultiHeadAttention(MultiHeadConfig(heads=2, causal=causal), 8)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention_over_padding_equals_attention_without(kind, causal, fill):
    layer = make_attention(kind, causal)
    x = torch.randn(5, 12, 8)
    present = torch.arange(12) < LENGTH_B[:, None]
    x[~present] = fill
    x.requires_grad_()
    y = layer(x, present)
    gradients = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    cut = [x[b : b + 1, :length].detach().requires_grad_() for b, length in enumerate(LENGTH_B)]
    outs = [layer(row) for row in cut]
    expected = torch.autograd.grad(sum(out.square().sum() for out in outs), [*cut, *layer.parameters()])
    for b, length in enumerate(LENGTH_B):
        torch.testing.assert_close(y[b, :length], outs[b][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients[0][b, :length], expected[b][0], rtol=1e-4, atol=1e-6)
    assert not y[~present].any()
    assert not gradients[0][~present].any()
    for mine, theirs in zip(gradients[1:], expected[5:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fill", [-1, 300, 0])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_padded_text_has_the_scores_and_loss_of_the_text_alone(attention, fill):
    network, batch = build(text_config(attention), seed=2), padded_text(fill)
    scores, loss = network(batch).scores, network.loss(batch)
    for b, length in enumerate(LENGTH_B.tolist()):
        text = {"text": batch["text"][b : b + 1, :length]}
        torch.testing.assert_close(scores[b, :length], network(text).scores[0], rtol=1e-5, atol=1e-5)
        if length >= 3:
            torch.testing.assert_close(loss[b], network.loss(text)[0], rtol=1e-5, atol=1e-6)
    assert float(loss[4].detach()) == 0.0  # one byte: nothing to predict


def test_a_text_without_a_byte_after_next_still_has_a_next_one():
    network, batch = build(text_config("multi-head"), seed=2), padded_text()
    two = {"text": batch["text"][3:4, :2]}
    expected = network.task_loss(network(two), two)
    torch.testing.assert_close(network.loss(batch)[3:4], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_padded_images_are_pooled_over_what_is_real(attention):
    network = build(make_image_transformer(ATTENTIONS[attention] | {"causal": False}), seed=2)
    batch = make_batch(4)
    length = torch.tensor([4, 3, 2, 1])
    # Patches in reading order: what lies behind the first ``length`` of the four is NaN.
    image = batch["image"].clone()
    image[1:, :, 4:, 4:] = float("nan")
    image[2:, :, 4:, :4] = float("nan")
    image[3:, :, :4, 4:] = float("inf")
    scores = network({"image": image, "length": length}).scores
    everything = torch.ones(6, dtype=torch.bool)
    for b in range(4):
        x = network.encoder(batch["image"][b : b + 1])[:, : length[b]]
        for block in network.blocks:
            x, _ = block(x, everything)
        expected = network.head.score(network.norm(x).mean(dim=1))
        torch.testing.assert_close(scores[b : b + 1], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["text", "image"])
def test_units_with_padding_contribute_what_they_would_alone(kind):
    if kind == "text":
        network, batch = build(text_config("latent"), seed=2), padded_text()
    else:
        network = build(make_image_transformer(LATENT | {"causal": False}), seed=2)
        batch = dict(make_batch(5)) | {"length": torch.tensor([4, 3, 2, 2, 1])}
        batch["image"][1:, :, 4:, 4:] = float("nan")
    truth = alone(network, network.loss, batch, torch.arange(5))
    assert all(gradient.isfinite().all() for gradient in truth.values())
    bookkeeper = Bookkeeper(network)
    found = bookkeeper.gradients(lambda: network.loss(batch), Units.one_each(5))
    bookkeeper.close()
    assert found.squared_bound_PU.isfinite().all()  # NaN in padding must not make a unit unusable
    for parameter, gradient in found.per_unit().items():
        assert relative_error(gradient, truth[parameter]) < 1e-5


def test_without_a_length_nothing_is_padding():
    batch = make_text(2)
    assert present_tokens(batch, 12) is None
    network = build(text_config("latent"), seed=2)
    full = batch | {"length": torch.tensor([12, 99])}
    torch.testing.assert_close(network.loss(full), network.loss(batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [torch.tensor([[1], [2]]), torch.tensor([1.0, 2.0]), torch.tensor([True, False])])
def test_lengths_of_another_kind_are_bad_input(length):
    with pytest.raises(BadInputError, match="must be one integer per example"):
        build(text_config("latent"), seed=2)(make_text(2) | {"length": length})


def test_padding_beside_a_balance_loss_is_refused():
    network = build(make_config(), seed=2)
    with pytest.raises(BadInputError, match=r"model\.experts\.balance is 0\.1, must be 0"):
        network.loss(make_batch(2) | {"length": torch.tensor([1, 2])})


def test_a_mean_over_nothing_is_zero():
    value = torch.full((2, 3), float("nan"))
    value[0, 0] = 5.0
    present = torch.tensor([[True, False, False], [False, False, False]])
    assert mean_over_present(value, present).tolist() == [5.0, 0.0]
    assert mean_over_present(value.unsqueeze(-1), present).tolist() == [[5.0], [0.0]]
