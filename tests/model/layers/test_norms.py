"""Normalisation of single tokens against its formula."""

from __future__ import annotations

import torch

from conclave.model.layers.norms import make_norm


def test_rms_divides_each_token_by_its_own_root_mean_square():
    x = torch.randn(2, 3, 8) * torch.tensor([0.01, 1.0, 100.0])[:, None]
    norm = make_norm("rms", 8)
    torch.testing.assert_close(norm(x), x / x.square().mean(-1, keepdim=True).sqrt(), rtol=1e-3, atol=1e-6)
    assert torch.equal(norm(x)[0, 0], norm(x[:1, :1])[0, 0])  # nothing of its neighbours


def test_none_changes_nothing():
    x = torch.randn(2, 3, 8)
    assert torch.equal(make_norm("none", 8)(x), x)
    assert list(make_norm("none", 8).parameters()) == []
