"""Robust aggregation against scipy and numpy, and against holders that lie as far as they may."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from scipy.stats import trim_mean
from server_samples import SmallFederation, ask, delta_for, held_of, train_reply

from conclave.server.aggregate.aggregation import WeightedDelta
from conclave.server.aggregate.config import AggregationConfig
from conclave.server.aggregate.robust import make_aggregator, trimmed_mean

A, UP, DOWN, ROW = "shared/a", "expert/0/1/up.weight", "expert/0/1/down.weight", "router/0/1/score.weight"
OPTIONS = [
    {"kind": "trimmed-mean", "trim": 0.2},
    {"kind": "median"},
    {"kind": "norm-bounded", "bound": 1.5},
    {"kind": "norm-bounded", "bound": 0.7, "relative": False},
]


def aggregate(options, contributions, min_holders=1):
    config = TypeAdapter(AggregationConfig).validate_python(options)
    aggregator = make_aggregator(config, sorted(item.node for item in contributions))
    for item in contributions:
        aggregator.add(item.node, item)
    return aggregator.result(min_holders)


def some(count, seed=1):
    """Contributions of ``count`` nodes; every other node does not hold the expert."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        names = {A: (3, 4)} | ({UP: (2, 5), DOWN: (5, 2), ROW: (3,)} if number % 2 == 0 else {})
        delta = {n: (number + 1) * torch.randn(shape, generator=generator) for n, shape in names.items()}
        found.append(WeightedDelta(f"n{number:02}", 1.0 + number, delta))
    return found


def stacked(contributions, name):
    return np.stack([c.delta[name].numpy() for c in contributions if name in c.delta]).astype(np.float64)


@pytest.mark.parametrize("count", range(1, 24))
@pytest.mark.parametrize("trim", [0.05, 0.1, 0.14, 0.2, 0.3, 0.49])
def test_trimmed_means_are_scipys_with_the_share_rounded_up(count, trim):
    values = torch.randn(count, 3, 4, generator=torch.Generator().manual_seed(count))
    cut = min(math.ceil(round(trim * count, 6)), (count - 1) // 2)
    expected = trim_mean(values.double().numpy(), (cut + 0.5) / count if cut else 0.0, axis=0)
    np.testing.assert_allclose(trimmed_mean(values, trim).numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", range(1, 12))
def test_medians_are_numpys(count):
    contributions = some(count)
    found = aggregate({"kind": "median"}, contributions)
    for name, tensor in found.items():
        np.testing.assert_allclose(
            tensor.numpy(), np.median(stacked(contributions, name), axis=0), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize(("bound", "relative"), [(0.5, True), (1.0, True), (3.0, True), (2.0, False), (1e6, False)])
def test_norm_bounded_means_by_a_loop(bound, relative):
    """Up and down projection of one expert are one group; its router row is another."""
    contributions = some(9)
    found = aggregate({"kind": "norm-bounded", "bound": bound, "relative": relative}, contributions)
    assert found.keys() == {A, UP, DOWN, ROW}
    for group in ([A], [UP, DOWN], [ROW]):
        holders = [c for c in contributions if group[0] in c.delta]
        norm = [math.sqrt(sum(float(c.delta[n].double().square().sum()) for n in group)) for c in holders]
        limit = bound * float(np.median(norm)) if relative else bound
        assert any(n > limit for n in norm) == (bound <= 2.0)
        for name in group:
            total = sum(
                c.weight * min(1.0, limit / n) * c.delta[name].double() for c, n in zip(holders, norm, strict=True)
            )
            expected = total / sum(c.weight for c in holders)
            torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
def test_order_and_min_holders_as_for_the_mean(options):
    contributions = some(5)
    first = aggregate(options, contributions)
    for order in itertools.islice(itertools.permutations(contributions), 0, 120, 7):
        again = aggregate(options, order)
        assert all(torch.equal(again[name], first[name]) for name in first)
    assert aggregate(options, contributions, min_holders=4).keys() == {A}
    assert aggregate(options, []) == {}


@pytest.mark.parametrize("options", OPTIONS)
def test_contributions_are_not_modified(options):
    contributions = some(5)
    before = [{n: t.clone() for n, t in c.delta.items()} for c in contributions]
    aggregate(options, contributions)
    assert all(torch.equal(t, old[n]) for c, old in zip(contributions, before, strict=True) for n, t in c.delta.items())


@pytest.mark.parametrize("options", OPTIONS[:3])
@pytest.mark.parametrize("lie", [1e6, -1e6])
def test_one_liar_of_seven_moves_a_mean_anywhere_and_a_robust_one_hardly(options, lie):
    generator = torch.Generator().manual_seed(5)
    honest = [WeightedDelta(f"h{n}", 1.0, {A: 1.0 + 0.1 * torch.randn(4, generator=generator)}) for n in range(6)]
    liar = WeightedDelta("liar", 1.0, {A: torch.full((4,), lie)})
    assert aggregate({"kind": "mean"}, [*honest, liar])[A].abs().min() > 1e5
    moved = aggregate(options, [*honest, liar])[A] - aggregate({"kind": "mean"}, honest)[A]
    # The median norm here is about 2, so at a bound of 1.5 the liar's share is a norm of at most 3/7.
    assert moved.abs().max() < 0.4


@pytest.mark.parametrize("options", OPTIONS)
def test_a_round_uses_what_the_configuration_names(options):
    federation = SmallFederation(nodes=4, aggregation=options)
    before = {n: t.clone() for n, t in federation.model.tensors.items()}
    requests = ask(federation)
    deltas = {r: delta_for(r, federation, 0.001 * 2 ** (r.metadata.dst_node_id - 10)) for r in requests}
    outcome = federation.answer(1, [train_reply(r, delta) for r, delta in deltas.items()])
    assert outcome.replies.accepted == 4
    contributions = [
        WeightedDelta(asked, 100.0 * (r.metadata.dst_node_id - 10), deltas[r])
        for r in requests
        for asked in [f"{r.metadata.dst_node_id}"]
    ]
    expected = aggregate(options, contributions)
    assert {int(n.split("/")[2]) for n in expected if "/0/" in n} == {e for r in requests for e in held_of(r)[0]}
    for name, tensor in federation.model.tensors.items():
        torch.testing.assert_close(tensor, before[name] + expected[name], rtol=0, atol=1e-6)
