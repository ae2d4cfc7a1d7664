"""The line that a round leaves in ``metrics.jsonl``, spelled out."""

from __future__ import annotations

import json
from collections import Counter

from conclave.privacy.releases.private_metrics import PrivateMean
from conclave.server.evaluate.private import PrivateEvaluation
from conclave.server.evaluate.public import Evaluation
from conclave.server.metrics import lacking, line_of, why_no_metrics
from conclave.server.rounds.outcome import Replies, RoundOutcome

REPLIES = Replies(
    refused=Counter({"paused": 2}),
    dropped_by=Counter({"replay": 1, "over-norm": 2}),
    missing=1,
    trained=({0: (0, 1)}, {0: (1, 2)}),
    bytes_up=2001,
)
COVERAGE = {"holders": [[1, 2, 1]], "holders_mean": [[1.0, 2.0, 1.0]], "rounds_without_holder": [[0, 0, 0]]}


def outcome(**changes) -> RoundOutcome:
    facts = {
        "number": 3,
        "nodes": 9,
        "asked": 8,
        "bytes_down": 8004,
        "replies": REPLIES,
        "changed": True,
        "unchanged_tensors": 4,
        "loads": None,
        "public": None,
        "private": None,
    }
    return RoundOutcome(**(facts | changes))


def test_a_line_says_what_the_round_came_to():
    line = line_of(outcome(), COVERAGE, bytes_full_model=5000, seconds=1.23456)
    assert (
        json.loads(json.dumps(line))
        == line
        == {
            "round": 3,
            "nodes": 9,
            "asked": 8,
            "accepted": 2,
            "refused": {"paused": 2},
            "dropped": 3,
            "dropped_by": {"replay": 1, "over-norm": 2},
            "missing": 1,
            "changed": True,
            "tensors_unchanged": 4,
            "bytes_down_per_node": 1000,
            "bytes_up_per_node": 1000,
            "bytes_full_model": 5000,
            "seconds": 1.2346,
            **COVERAGE,
        }
    )
    assert why_no_metrics(line) is None
    assert lacking([line_of(outcome(number=1), COVERAGE, 5000, 0.1)]) is None


def test_what_was_measured_stands_in_it_and_what_a_task_does_not_have_does_not():
    public = Evaluation(loss=1.5, load=((0.25, 0.5, 0.25),), accuracy=0.5, accuracy_without_experts=0.25)
    private = PrivateEvaluation("accuracy", 1.0, asked=2, over_units=PrivateMean(0.75, 0.01))
    measured = outcome(public=public, private=private, loads=[[None, 1.5, 0.5]])
    line = line_of(measured, COVERAGE, bytes_full_model=5000, seconds=1.0)
    assert (line["loss"], line["accuracy"], line["private_load"]) == (1.5, 0.5, [[None, 1.5, 0.5]])
    assert line["private_evaluation"]["over_units"] == [0.75, 0.01]
    assert "bits_per_byte" not in line
    assert why_no_metrics(json.loads(json.dumps(line))) is None
    assert (
        measured.sentence(60, 1.0)
        == "round 3 of 60: loss 1.5000, 2 of 8 replies, accuracy on held-out units 0.7500, 1.0 s"
    )
