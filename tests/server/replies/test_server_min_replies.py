"""A round with too few acceptable replies changes nothing; the next one is what it would have been."""

from __future__ import annotations

import pytest
import torch
from server_samples import ask, delta_for, make_strategy, train_reply

from conclave.base.errors import BadInputError
from conclave.server.scenario import read_scenario
from conclave.simulations.shipped import find

OPTIONS = {"min_replies": 3, "optimizer": {"kind": "adam", "decay": 0.9, "warmup_rounds": 2}}


def snapshot(strategy):
    kept = {(n, k): t.clone() for n, found in strategy.optimizer.state().items() for k, t in found.items()}
    return {n: t.clone() for n, t in strategy.optimizer.snapshot().items()}, kept


def answer(strategy, round_number, count):
    requests = ask(strategy, round_number)[:count]
    return strategy.aggregate_train(round_number, [train_reply(r, delta_for(r, strategy)) for r in requests])


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_replies_change_neither_model_nor_state_and_the_schedule_goes_by_number(count):
    strategy, twin = make_strategy(nodes=4, **OPTIONS), make_strategy(nodes=4, **OPTIONS)
    answer(strategy, 1, 4)
    before = snapshot(strategy)
    assert before[1]
    assert answer(strategy, 2, count) == (None, None)
    assert (strategy.tally.accepted, strategy.tally.missing, strategy.tally.changed) == (count, 4 - count, False)
    for old, new in zip(before, snapshot(strategy), strict=True):
        assert old.keys() == new.keys()
        assert all(torch.equal(tensor, old[key]) for key, tensor in new.items())
    assert len(strategy.receipts._known) == 4 + count  # what was charged is on record
    answer(twin, 1, 4)
    for each in (strategy, twin):  # the twin never had a round 2
        answer(each, 3, 3)
        assert each.tally.changed
    for old, new in zip(snapshot(twin), snapshot(strategy), strict=True):
        assert all(torch.equal(tensor, old[key]) for key, tensor in new.items())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"federation.min_replies": 11}, "federation.min_replies is 11, must be at most partition.nodes 10"),
        (
            {"federation.min_replies": 3, "federation.cohort": {"kind": "fixed", "size": 2}},
            "federation: min_replies is 3, must be at most cohort.size 2",
        ),
        (
            {"federation.optimizer.warmup_rounds": 60},
            "federation: optimizer.warmup_rounds is 60, must be less than rounds 60",
        ),
        (
            {"federation.aggregation": {"kind": "mode"}},
            "federation.aggregation.kind is 'mode', must be one of mean, median, norm-bounded, trimmed-mean",
        ),
        (
            {"federation.aggregation.trim": 0.5, "federation.aggregation.kind": "trimmed-mean"},
            "federation.aggregation.trim",
        ),
        ({"federation.optimizer.kind": "lion"}, "federation.optimizer.kind is 'lion', must be one of"),
        ({"federation.optimizer.momentum": 0.5, "federation.optimizer.kind": "adam"}, "federation.optimizer.momentum"),
    ],
)
def test_what_does_not_fit_is_one_sentence(changes, sentence):
    with pytest.raises(BadInputError) as caught:
        read_scenario(find("digits"), changes)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_override_picks_another_optimizer():
    scenario = read_scenario(find("digits"), {"federation.optimizer.kind": "adagrad"})
    assert scenario.federation.optimizer.kind == "adagrad"
    assert scenario.federation.optimizer.decay == 0.8
