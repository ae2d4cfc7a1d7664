"""Dispatch: rows sorted by (expert, example, token), each with the example it belongs to, none dropped."""

from __future__ import annotations

import pytest
import torch
from conftest import make_config

from conclave.model.experts.moe import MoELayer, dispatch


def random_choice(examples, tokens, top_k, experts):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randperm(experts, generator=generator)[:top_k] for _ in range(examples * tokens)]
    return torch.stack(rows).view(examples, tokens, top_k)


@pytest.mark.parametrize(
    ("examples", "tokens", "top_k", "experts"), [(4, 3, 2, 5), (1, 1, 1, 3), (6, 1, 3, 3), (2, 7, 1, 20)]
)
def test_rows_offsets_and_examples_match_sorted_tuples(examples, tokens, top_k, experts):
    choice = random_choice(examples, tokens, top_k, experts)
    plan = dispatch(choice, experts)
    rows = [(int(choice[b, t, k]), b, t, k) for b in range(examples) for t in range(tokens) for k in range(top_k)]
    in_order = sorted(rows)
    assert [rows[n] for n in plan.order_N.tolist()] == in_order
    assert plan.example_N.tolist() == [b for _, b, _, _ in in_order]
    assert plan.offsets_E.tolist() == [sum(e <= last for e, *_ in rows) for last in range(experts)]
    assert plan.offsets_E.dtype == torch.int32


def test_every_grouped_product_is_told_the_example_of_each_row():
    layer = MoELayer(make_config(shared=0).experts, range(6), 16)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_()
    seen = []
    for product in (layer.experts.up, layer.experts.down):
        product.register_forward_pre_hook(lambda _, args: seen.append(args))
    # Each example's tokens carry its number in the first value, which ``up`` then sees in its rows.
    x = torch.randn(5, 4, 16)
    x[:, :, 0] = torch.arange(5.0).unsqueeze(1)
    layer(x, torch.ones(6, dtype=torch.bool))
    rows, offsets, example, examples = seen[0]
    assert example.tolist() == [int(row[0]) for row in rows]
    assert (len(rows), int(offsets[-1]), len(examples)) == (5 * 4 * 2, 5 * 4 * 2, 5)
    assert all(torch.equal(a, b) for a, b in zip(seen[0][1:], seen[1][1:], strict=True))
