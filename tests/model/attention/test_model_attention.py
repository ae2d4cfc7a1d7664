"""Attention and the text model against loops and known properties."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make_text, make_text_config
from family_samples import LATENT
from pydantic import ValidationError
from torch import nn

from conclave.base.errors import BadInputError
from conclave.model import parameters
from conclave.model.attention.config import MultiHeadConfig
from conclave.model.attention.multi_head import MultiHeadAttention, rotate
from conclave.model.building import build
from conclave.model.config import ModelConfig
from conclave.model.store import load, save_model

IMAGE = {"kind": "image-patch", "height": 8, "width": 8, "patch": 4}


def loop_rotate(x_TW, base):
    """Each pair as a complex number, turned by its angle."""
    tokens, width = x_TW.shape
    half = width // 2
    out = torch.zeros_like(x_TW)
    for t in range(tokens):
        for w in range(half):
            angle = t * base ** (-2 * w / width)
            z = complex(x_TW[t, w], x_TW[t, w + half]) * complex(math.cos(angle), math.sin(angle))
            out[t, w], out[t, w + half] = z.real, z.imag
    return out


def test_rotation_equals_complex_multiplication():
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    got = rotate(x, 100.0)
    for b in range(2):
        for h in range(3):
            torch.testing.assert_close(got[b, h], loop_rotate(x[b, h], 100.0), rtol=1e-5, atol=1e-6)


def test_rotated_products_depend_on_distance_alone():
    query, key = torch.randn(8), torch.randn(8)
    q, k = (rotate(v.expand(1, 1, 20, 8), 10_000.0)[0, 0] for v in (query, key))
    scores = q @ k.T
    for distance in range(5):
        along = scores.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-4, atol=1e-5)
    assert (scores[5, 5] - scores[5, 0]).abs() > 1e-3


@pytest.mark.parametrize("causal", [True, False])
def test_attention_equals_a_loop(causal):
    layer = MultiHeadAttention(MultiHeadConfig(heads=2, causal=causal, rope_base=50.0), 8).requires_grad_(False)
    x = torch.randn(2, 5, 8)
    expected = torch.zeros_like(x)
    for b in range(2):
        mixed = torch.zeros(5, 8)
        for h in range(2):
            part = slice(4 * h, 4 * h + 4)
            q = loop_rotate((x[b] @ layer.query.weight.T)[:, part], 50.0)
            k = loop_rotate((x[b] @ layer.key.weight.T)[:, part], 50.0)
            v = (x[b] @ layer.value.weight.T)[:, part]
            for t in range(5):
                seen = t + 1 if causal else 5
                scores = torch.stack([q[t] @ k[s] / 2.0 for s in range(seen)])  # √4 = 2
                mixed[t, part] = (scores.softmax(0)[:, None] * v[:seen]).sum(0)
        expected[b] = mixed @ layer.out.weight.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_without_rotation_it_is_torchs_multi_head_attention(causal, monkeypatch):
    monkeypatch.setattr("conclave.model.attention.multi_head.rotate", lambda x, base: x)
    layer = MultiHeadAttention(MultiHeadConfig(heads=2, causal=causal), 8)
    theirs = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([layer.query.weight, layer.key.weight, layer.value.weight]))
        theirs.out_proj.weight.copy_(layer.out.weight)
    x = torch.randn(2, 5, 8)
    present = torch.arange(5) < torch.tensor([[5], [3]])
    future = torch.ones(5, 5, dtype=torch.bool).triu(1) if causal else None
    expected, _ = theirs(x, x, x, attn_mask=future, key_padding_mask=~present, need_weights=False)
    torch.testing.assert_close(layer(x, present)[present], expected[present], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", [{"heads": 2}, LATENT])
def test_no_byte_sees_a_later_one(attention):
    network = build(make_text_config(attention=attention), seed=2)
    text = make_text(3)["text"]
    changed = text.clone()
    changed[:, 7:] = 255 - changed[:, 7:]
    before, after = network({"text": text}).scores, network({"text": changed}).scores
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=1e-5, atol=1e-6)
    assert (before[:, 7:] - after[:, 7:]).abs().max() > 1e-2


def test_the_loss_is_the_mean_over_the_next_bytes():
    config = make_text_config(experts={"routed": 4, "hidden": 8, "top_k": 2, "balance": 0.0})
    network, batch = build(config, seed=2), make_text(3)
    logs = network(batch).scores.detach().log_softmax(-1)
    losses = network.loss(batch).detach()
    for unit in range(3):
        text = batch["text"][unit].tolist()
        terms = [-float(logs[unit, t, text[t + 1]]) for t in range(11)]
        assert float(losses[unit]) == pytest.approx(sum(terms) / 11, rel=1e-5)


def test_units_are_independent():
    network, batch = build(make_text_config(), seed=2), make_text(6)
    together = network.loss(batch)
    for unit in range(6):
        alone = network.loss({"text": batch["text"][unit : unit + 1]})
        torch.testing.assert_close(together[unit : unit + 1], alone, rtol=1e-5, atol=1e-6)


def test_the_forward_pass_changes_no_state():
    network = build(make_text_config(), seed=2)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.loss(make_text(4)).sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not list(network.buffers())


def test_names_on_the_wire_and_on_disk(tmp_path):
    config = make_text_config()
    network = build(config, seed=2)
    assert all(tensor.isfinite().all() for tensor in network.parameters())
    wire = parameters.split(network.state_dict(), network.held)
    assert "shared/blocks.1.attention.query.weight" in wire
    assert "expert/1/3/up.weight" in wire
    assert "shared/encoder.table.weight" in wire
    save_model(tmp_path, config, wire)
    assert torch.equal(load(tmp_path).loss(make_text(2)), network.loss(make_text(2)))


def test_a_shorter_text_is_fine_and_a_longer_one_is_not():
    network = build(make_text_config(), seed=2)
    text = make_text(2)["text"]
    torch.testing.assert_close(
        network({"text": text[:, :5]}).scores, network({"text": text}).scores[:, :5], rtol=1e-5, atol=1e-6
    )
    with pytest.raises(BadInputError, match="at most 12"):
        network({"text": make_text(2, window=13)["text"]})


def test_attention_without_a_kind_is_multi_head():
    assert make_text_config(attention={"heads": 2}).attention == MultiHeadConfig(heads=2)
    assert make_text_config(attention=MultiHeadConfig(heads=2)).attention == MultiHeadConfig(heads=2)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"preset": "moe"}, "one layer and no attention"),
        ({"attention": None}, "model.attention is missing"),
        ({"attention": {"heads": 3}}, "model.attention.heads is 3"),
        ({"attention": {"heads": 16}}, "model.attention.heads is 16"),
        ({"attention": LATENT | {"heads": 3}}, "model.attention.heads is 3, must divide the width 16"),
        ({"attention": {"heads": 2, "causal": False}}, "model.attention.causal is false, must be true"),
        ({"attention": LATENT | {"rope_width": 3}}, "multiple of 2"),
        ({"attention": LATENT | {"kv_rank": 0}}, "greater than or equal to 1"),
        ({"attention": {"heads": 2, "kv_rank": 4}}, "Extra inputs are not permitted"),
        ({"attention": {"kind": "linear", "heads": 2}}, "does not match any of the expected tags"),
        (
            {"encoder": {"kind": "bytes", "window": 2}, "head": {"kind": "next-byte", "after_next": 0.1}},
            "model.encoder.window is 2, must be at least 3",
        ),
        ({"head": {"kind": "next-byte", "after_next": -0.1}}, "greater than or equal to 0"),
        ({"head": {"kind": "classification", "classes": 3}}, "does not fit the encoder bytes"),
        ({"encoder": IMAGE}, "does not fit the encoder image-patch"),
        ({"preset": "moe", "layers": 1, "attention": None}, "without attention no byte sees another"),
        ({"layers": 0}, "greater than or equal to 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_refused(changes, sentence):
    with pytest.raises(ValidationError, match=sentence.replace(".", r"\.")):
        ModelConfig.model_validate(make_text_config().model_dump(exclude_none=True) | changes)
