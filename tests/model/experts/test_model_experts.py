"""GroupedLinear against row-by-row closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.func import functional_call

from conclave.model.experts.stacked import GroupedLinear

SIZES = [
    [2, 3, 1],
    [0, 1, 3, 0, 2],
    [1, 1, 1],
    [0, 0, 4],
    [5, 0, 0],
    [0, 1, 0],
]


def layer_and_rows(sizes, dtype, in_width=16, out_width=8):
    generator = torch.Generator().manual_seed(7)
    layer = GroupedLinear(len(sizes), in_width, out_width).to(dtype)
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
    rows = torch.randn(sum(sizes), in_width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return layer, rows


def run(layer, rows, sizes):
    offsets = torch.tensor(np.cumsum(sizes), dtype=torch.int32)
    example = torch.zeros(len(rows), dtype=torch.int64)
    return layer(rows, offsets, example, torch.arange(1))


def reference(layer, rows, sizes, grad):
    """Row by row, in float64: y = xW, dx = dy Wᵀ, dW = Σ x⊗dy over the group's rows."""
    x, w, dy = (t.detach().double().numpy() for t in (rows, layer.weight, grad))
    group = [e for e, size in enumerate(sizes) for _ in range(size)]
    y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w)
    for n, e in enumerate(group):
        y[n] = [sum(x[n, i] * w[e, i, o] for i in range(w.shape[1])) for o in range(w.shape[2])]
        dx[n] = [sum(dy[n, o] * w[e, i, o] for o in range(w.shape[2])) for i in range(w.shape[1])]
        dw[e] += np.outer(x[n], dy[n])
    return y, dx, dw


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", SIZES)
def test_forward_and_backward_equal_the_closed_form(sizes, dtype):
    layer, rows = layer_and_rows(sizes, dtype)
    grad = torch.randn(len(rows), 8, generator=torch.Generator().manual_seed(8)).to(dtype)
    out = run(layer, rows, sizes)
    out.backward(grad)
    y, dx, dw = reference(layer, rows, sizes, grad)
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-12}[dtype]
    assert out.dtype == dtype
    np.testing.assert_allclose(out.detach().numpy(), y, rtol=0, atol=tolerance)
    np.testing.assert_allclose(rows.grad.numpy(), dx, rtol=0, atol=tolerance)
    np.testing.assert_allclose(layer.weight.grad.numpy(), dw, rtol=0, atol=tolerance)
    for expert, size in enumerate(sizes):
        if size == 0:
            assert not layer.weight.grad[expert].any()


@pytest.mark.parametrize("sizes", [[2, 0, 1], [0, 1, 3, 0, 2]])
def test_gradcheck(sizes):
    layer, rows = layer_and_rows(sizes, torch.float64, in_width=3, out_width=2)
    offsets = torch.tensor(np.cumsum(sizes), dtype=torch.int32)
    example = torch.zeros(len(rows), dtype=torch.int64)

    def f(rows, weight):
        return functional_call(layer, {"weight": weight}, (rows, offsets, example, torch.arange(1)))

    # An undefined (None) incoming gradient never reaches the layer: every consumer of its rows is differentiable.
    assert torch.autograd.gradcheck(f, (rows, layer.weight), check_undefined_grad=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_expanded_gradient_is_welcome(dtype):
    sizes = [0, 1, 3, 0, 2]
    layer, rows = layer_and_rows(sizes, dtype)
    run(layer, rows, sizes).sum().backward()  # sum's gradient has stride 0
    _, dx, dw = reference(layer, rows, sizes, torch.ones(len(rows), 8))
    np.testing.assert_allclose(rows.grad.numpy(), dx, rtol=0, atol=2e-5)
    np.testing.assert_allclose(layer.weight.grad.numpy(), dw, rtol=0, atol=2e-5)
