"""Coverage: refused where it cannot be reached, foretold where chance decides, and counted while a run goes."""

from __future__ import annotations

import itertools
import math

import pytest
from server_samples import SmallFederation, ask, delta_for, held_of, train_reply

from conclave.server.rounds.config import FederationConfig
from conclave.server.rounds.coverage import Coverage, outlook, shortage


def federation(**changes) -> FederationConfig:
    return FederationConfig.model_validate({"rounds": 100, "experts_per_node": 4} | changes)


@pytest.mark.parametrize(
    ("changes", "capacities", "sentence"),
    [
        ({"min_holders": 5}, [8] * 10, None),
        (
            {"min_holders": 6},
            [8] * 10,
            "must be at most 5: 10 nodes × 4 experts hold 40 places, 8 experts × min_holders 6 need 48",
        ),
        ({"min_holders": 3}, [8, 4, 2] * 3, None),  # 4 + 4 + 2, three times: 30 places for 24
        (
            {"min_holders": 4},
            [8, 4, 2] * 3,
            "must be at most 3: 9 nodes × 2 to 4 experts hold 30 places, 8 experts × min_holders 4 need 32",
        ),
        ({"min_holders": 1, "cohort": {"kind": "fixed", "size": 2}}, [4] * 10, None),
        (
            {"min_holders": 1, "cohort": {"kind": "fixed", "size": 1}},
            [4] * 10,
            "must be at most 0: 1 node a round × 4 experts hold 4 places, 8 experts × min_holders 1 need 8",
        ),
        ({"min_holders": 0, "cohort": {"kind": "fixed", "size": 1}}, [4] * 10, None),
        # only what no cohort could reach is refused: the two with most room would do
        ({"min_holders": 1, "cohort": {"kind": "fixed", "size": 2}}, [4, 4, 1, 1], None),
        ({"min_holders": 5, "cohort": {"kind": "poisson", "rate": 0.01}}, [4] * 10, None),
        ({"min_holders": 6, "cohort": {"kind": "poisson", "rate": 1.0}}, [4] * 10, "must be at most 5: 10 nodes × 4"),
        ({"min_holders": 11, "assignment": "all", "experts_per_node": 8}, [8] * 10, "10 nodes × 8 experts hold 80"),
        ({"min_holders": 10, "assignment": "all", "experts_per_node": 8}, [8] * 10, None),
        ({"min_holders": 6, "expert_scope": "local"}, [8] * 10, None),  # nobody holds for others
        ({"min_holders": 6, "expert_scope": "mixed", "local_experts": 2}, [8] * 10, "must be at most 5"),
    ],
)
def test_a_shortage_is_told_with_its_arithmetic(changes, capacities, sentence):
    found = shortage(federation(**changes), 8, capacities)
    if sentence is None:
        assert found is None
    else:
        assert found.startswith(f"federation.min_holders is {changes['min_holders']}, must be at most ")
        assert sentence in found


@pytest.mark.parametrize("assignment", ["balanced", "sticky"])
@pytest.mark.parametrize("capacities", [[4] * 10, [4, 2, 1] * 4, [1] * 16])
def test_what_is_not_refused_is_reached_in_every_round(assignment, capacities):
    least = max(m for m in range(6) if shortage(federation(min_holders=m), 8, capacities) is None)
    nodes = {f"n{n}": c for n, c in enumerate(capacities)}
    expected = outlook(federation(min_holders=least, assignment=assignment), 8, 2, nodes, seed=3)
    assert expected.short == 0
    assert expected.holders == sum(min(4, c) for c in capacities) / 8


def test_what_chance_decides_is_foretold():
    nodes = {f"n{n}": 8 for n in range(10)}
    cohort = {"kind": "poisson", "rate": 0.3}
    expected = outlook(federation(assignment="random", cohort=cohort, min_holders=2), 8, 1, nodes, seed=3)
    assert expected.holders == pytest.approx(0.3 * 10 * 4 / 8)
    # An expert has binomial(10, 0.15) holders. 100 rounds of 8 experts: were a round's experts wholly dependent, the
    # share would deviate by sqrt(p(1 − p)/100) = 0.05: within 5 of those, false alarm 6e-7.
    rare = sum(math.comb(10, k) * 0.15**k * 0.85 ** (10 - k) for k in (0, 1))
    assert abs(expected.short - rare) < 0.25


def test_coverage_counts_holders_by_layer_and_expert():
    coverage = Coverage(layers=2, experts=3, min_holders=2)
    coverage.add([{0: (0, 1), 1: (1, 2)}, {0: (1, 2), 1: (1, 2)}])
    assert coverage.metrics()["holders"] == [[1, 2, 1], [0, 2, 2]]
    first = coverage.metrics()
    coverage.add([{0: (0,), 1: (0,)}])
    assert coverage.metrics() == {
        "holders": [[1, 0, 0], [1, 0, 0]],
        "holders_mean": [[1.0, 1.0, 0.5], [0.5, 1.0, 1.0]],
        "rounds_without_holder": [[0, 1, 1], [1, 1, 1]],
    }
    assert coverage.short == 3 + 6  # round one: experts 0 and 2 of layer 0, 0 of layer 1; round two: all
    resumed = Coverage(layers=2, experts=3, min_holders=2)
    resumed.restore([{"round": 0}, first, {"holders": coverage.last}])
    resumed.restore([{"holders": [[1, 1, 1]]}, {"holders": [[1] * 4] * 2}])  # of another model
    assert resumed.metrics() == coverage.metrics()


def test_only_accepted_replies_count_as_holders():
    federation = SmallFederation(nodes=3)
    requests = ask(federation)
    replies = [
        train_reply(r, delta_for(r, federation, float("nan") if n == 0 else 0.001)) for n, r in enumerate(requests)
    ]
    held = [held_of(request) for request in requests]
    outcome = federation.answer(1, replies)
    assert sorted(map(str, outcome.replies.trained)) == sorted(map(str, held[1:]))


def test_a_sticky_assignment_asks_the_same_of_a_node_in_every_round():
    federation = SmallFederation(nodes=5, assignment="sticky")
    first = [str(held) for _, held in _asked(federation, 1)]
    assert all([str(held) for _, held in _asked(federation, r)] == first for r in (2, 3, 9))
    half = SmallFederation(nodes=5, assignment="sticky", min_holders=1, cohort={"kind": "fixed", "size": 3})
    for round_number in range(1, 20):
        held = [held[0] for _, held in _asked(half, round_number)]
        assert set(itertools.chain.from_iterable(held)) == set(range(6))


def _asked(federation, round_number):
    return [(asked.node.fingerprint, asked.request.held) for asked in federation.requests(round_number).asked.values()]
