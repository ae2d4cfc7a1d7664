"""Latent attention against a loop over heads and tokens in float64, and its known properties."""

from __future__ import annotations

import math

import pytest
import torch
from family_samples import LATENT
from torch.func import functional_call

from conclave.model.attention.config import LatentConfig
from conclave.model.attention.latent import LatentAttention

HEADS, WIDTH, TOKENS = 2, 8, 6


def make_layer(norm="rms", **changes):
    layer = LatentAttention(LatentConfig(**LATENT | {"rope_base": 50.0} | changes), WIDTH, norm).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return layer.requires_grad_(False)


def turned(vector, t, base):
    half = len(vector) // 2
    out = torch.zeros_like(vector)
    for w in range(half):
        angle = t * base ** (-w / half)
        a, b = vector[w], vector[w + half]
        out[w] = a * math.cos(angle) - b * math.sin(angle)
        out[w + half] = a * math.sin(angle) + b * math.cos(angle)
    return out


def normed(vector, norm):
    if isinstance(norm, torch.nn.Identity):
        return vector
    return norm.weight * vector / (vector.square().mean() + torch.finfo(torch.float64).eps).sqrt()


def loop(layer, x_TD, visible):
    """The paper's equations 9 to 19, one token and one head at a time; ``visible(t, s)``: t attends to s."""
    c, content = layer.config, WIDTH // HEADS
    latent = [normed(layer.kv_down.weight @ x, layer.kv_norm) for x in x_TD]
    if c.query_rank is None:
        query_from = list(x_TD)
    else:
        query_from = [normed(layer.query_down.weight @ x, layer.query_norm) for x in x_TD]
    shared_key = [turned(layer.key_rope.weight @ x, t, c.rope_base) for t, x in enumerate(x_TD)]
    out = []
    for t in range(len(x_TD)):
        heads = []
        for h in range(HEADS):
            rows, rotated = slice(h * content, (h + 1) * content), slice(h * c.rope_width, (h + 1) * c.rope_width)
            query = layer.query_up.weight[rows] @ query_from[t]
            query_rotated = turned(layer.query_rope.weight[rotated] @ query_from[t], t, c.rope_base)
            seen = [s for s in range(len(x_TD)) if visible(t, s)]
            scores = [
                (query @ (layer.key_up.weight[rows] @ latent[s]) + query_rotated @ shared_key[s])
                / math.sqrt(content + c.rope_width)
                for s in seen
            ]
            share = torch.stack(scores).exp() / torch.stack(scores).exp().sum()
            heads.append(sum(p * (layer.value_up.weight[rows] @ latent[s]) for p, s in zip(share, seen, strict=True)))
        out.append(layer.out.weight @ torch.cat(heads))
    return torch.stack(out)


@pytest.mark.parametrize("norm", ["rms", "none"])
@pytest.mark.parametrize("query_rank", [None, 5])
@pytest.mark.parametrize("causal", [True, False])
def test_it_equals_the_loop(causal, query_rank, norm):
    layer = make_layer(norm, causal=causal, query_rank=query_rank)
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    expected = torch.stack([loop(layer, row, lambda t, s: s <= t or not causal) for row in x])
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
def test_with_padding_it_equals_the_loop_over_what_is_real(causal):
    layer = make_layer(causal=causal, query_rank=5)
    x = torch.randn(3, TOKENS, WIDTH, dtype=torch.float64)
    present = torch.arange(TOKENS) < torch.tensor([[4], [1], [6]])
    x[~present] = float("nan")
    got = layer(x, present)
    for row, here, y in zip(x, present, got, strict=True):
        expected = loop(layer, row[here], lambda t, s: s <= t or not causal)
        torch.testing.assert_close(y[here], expected, rtol=1e-10, atol=1e-10)
        assert not y[~here].any()


def test_only_the_rotated_part_knows_positions():
    layer = make_layer(causal=False)
    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64)
    order = torch.randperm(TOKENS)
    assert (layer(x)[:, order] - layer(x[:, order])).abs().max() > 1e-3
    layer.key_rope.weight.zero_()
    torch.testing.assert_close(layer(x)[:, order], layer(x[:, order]), rtol=1e-10, atol=1e-10)


def test_positions_enter_as_distances_alone():
    layer = make_layer()
    x = torch.randn(1, 4, WIDTH, dtype=torch.float64)
    later = torch.cat([torch.zeros(1, 7, WIDTH, dtype=torch.float64), x], dim=1)
    present = torch.arange(11)[None] >= 7  # what stands before them is not seen
    torch.testing.assert_close(layer(later, present)[:, 7:], layer(x), rtol=1e-10, atol=1e-10)


def test_a_token_keeps_its_latent_vector_and_one_rotated_key():
    layer = make_layer()
    assert (layer.kv_down.out_features, layer.key_rope.out_features) == (6, 4)
    assert {layer.key_up.in_features, layer.value_up.in_features} == {6}
    assert layer.query_rope.out_features == 2 * 4  # each head has its own


@pytest.mark.parametrize("padded", [False, True])
def test_gradcheck(padded):
    layer = make_layer(query_rank=5)
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    present = torch.tensor([[True, True, False], [True, True, True]]) if padded else None
    names = [name for name, _ in layer.named_parameters()]
    weights = [p.clone().requires_grad_() for p in layer.parameters()]

    def f(x, *weights):
        return functional_call(layer, dict(zip(names, weights, strict=True)), (x, present))

    assert torch.autograd.gradcheck(f, (x, *weights))
