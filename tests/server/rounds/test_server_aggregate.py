"""From the replies of a round to the next model, and what too few of them change: nothing."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from server_samples import NO_PRIVACY, SmallFederation, ask, delta_for, encoded, held_of, make_plan, train_reply


@pytest.mark.parametrize("weights", ["declared", "uniform"])
def test_a_round_applies_the_weighted_mean_over_holders(weights):
    federation = SmallFederation(nodes=4, weights=weights, optimizer={"learning_rate": 0.5, "decay": 0.5})
    before = federation.values()
    requests = ask(federation, 3)
    federation.answer(
        3, [train_reply(r, delta_for(r, federation, 0.001 * (r.metadata.dst_node_id - 10) ** 2)) for r in requests]
    )
    rate = 0.5 * (1 - 0.5 * 2 / 9)  # round 3 of 10
    for name, tensor in federation.values().items():
        layer_expert = name.split("/")[1:3] if not name.startswith("shared/") else None
        holders = [
            r.metadata.dst_node_id - 10
            for r in requests
            if layer_expert is None or int(layer_expert[1]) in held_of(r)[int(layer_expert[0])]
        ]
        weight = {n: (100.0 * n if weights == "declared" else 1.0) for n in holders}
        mean = sum(weight[n] * 0.001 * n**2 for n in holders) / sum(weight.values())
        torch.testing.assert_close(tensor, before[name] + rate * mean, rtol=0, atol=1e-6)


def test_an_expert_with_too_few_holders_keeps_its_value():
    federation = SmallFederation(nodes=3, min_holders=2)
    before = federation.values()
    requests = ask(federation)
    outcome = federation.answer(1, [train_reply(r, delta_for(r, federation)) for r in requests])
    holders = Counter(e for r in requests for e in held_of(r)[0])
    kept = {n for n, t in federation.values().items() if torch.equal(t, before[n])}
    single = {e for e in range(6) if holders[e] < 2}
    assert 0 < len(single) < 6
    assert kept == {n for n in before if not n.startswith("shared/") and int(n.split("/")[2]) in single}
    assert outcome.unchanged_tensors == len(kept)


def test_the_order_of_replies_does_not_touch_a_bit():
    size = {11: 1e15, 12: 1.0, 13: -1e15, 14: 3e9}  # summed in another order, floats give another result
    results = []
    for backwards in (False, True):
        federation = SmallFederation(nodes=4, plan=NO_PRIVACY, weights="uniform")
        replies = [train_reply(r, delta_for(r, federation, size[r.metadata.dst_node_id])) for r in ask(federation)]
        outcome = federation.answer(1, reversed(replies) if backwards else replies)
        assert outcome.replies.accepted == 4
        results.append(federation.values())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_an_empty_poisson_round_asks_nobody_and_goes_on():
    federation = SmallFederation(nodes=2, cohort={"kind": "poisson", "rate": 1e-9})
    assert ask(federation) == []
    outcome = federation.answer(1, [])
    assert (outcome.asked, outcome.replies.missing, outcome.bytes_down, outcome.changed) == (0, 0, 0, False)


@pytest.mark.parametrize("encoding", ["bf16", "int8"])
def test_rounded_deltas_are_averaged_as_what_they_stand_for(encoding):
    federation = SmallFederation(nodes=1, plan=make_plan(traffic={"delta": encoding}))
    before = federation.values()
    (request,) = ask(federation)
    generator = torch.Generator().manual_seed(5)
    delta = {n: 0.01 * torch.randn(t.shape, generator=generator) for n, t in delta_for(request, federation).items()}
    outcome = federation.answer(1, [train_reply(request, encoded(request, delta, federation))])
    assert outcome.replies.accepted == 1
    for name, tensor in federation.values().items():
        if name not in delta:
            assert torch.equal(tensor, before[name])
            continue
        rows = (delta[name].reshape(1, -1) if delta[name].ndim < 2 else delta[name].flatten(1)).abs()
        step = rows.amax(1, keepdim=True) / 126 if encoding == "int8" else rows * 2**-7
        moved = (tensor - before[name] - delta[name]).reshape(rows.shape).abs()
        assert (moved < step + 1e-7).all()
        assert moved.max() > 0.1 * step.min()


OPTIONS = {"min_replies": 3, "optimizer": {"kind": "adam", "decay": 0.9, "warmup_rounds": 2}}


def snapshot(federation):
    optimizer = federation.model.checkpoint(1).optimizer
    return federation.values(), {(n, k): t.clone() for n, kept in optimizer.items() for k, t in kept.items()}


def answer(federation, round_number, count):
    requests = ask(federation, round_number)[:count]
    return federation.answer(round_number, [train_reply(r, delta_for(r, federation)) for r in requests])


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_replies_change_neither_model_nor_state_and_the_schedule_goes_by_number(count):
    federation, twin = SmallFederation(nodes=4, **OPTIONS), SmallFederation(nodes=4, **OPTIONS)
    answer(federation, 1, 4)
    before = snapshot(federation)
    assert before[1]
    outcome = answer(federation, 2, count)
    assert (outcome.replies.accepted, outcome.replies.missing, outcome.changed) == (count, 4 - count, False)
    for old, new in zip(before, snapshot(federation), strict=True):
        assert old.keys() == new.keys()
        assert all(torch.equal(tensor, old[key]) for key, tensor in new.items())
    assert len(federation.books.receipts._known) == 4 + count  # what was charged is on record
    answer(twin, 1, 4)
    for each in (federation, twin):  # the twin never had a round 2
        assert answer(each, 3, 3).changed
    for old, new in zip(snapshot(twin), snapshot(federation), strict=True):
        assert all(torch.equal(tensor, old[key]) for key, tensor in new.items())
