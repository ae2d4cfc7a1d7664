"""A run's metrics, one mapping a round: how a line is made and may look, and what they come to over the rounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

if TYPE_CHECKING:  # who only reads metrics needs no Flower
    from conclave.server.rounds.outcome import RoundOutcome

_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Counts = dict[str, _Count]
_Layers = list[list[_Finite]]
_Pair = Annotated[list[_Finite], Field(min_length=2, max_length=2)] | None


class _Typed(BaseModel):
    """If a key is there, it has this type. Older versions of Conclave left keys out, newer ones add some."""

    model_config = ConfigDict(strict=True, extra="allow")


class _HeldOut(_Typed):
    metric: str
    over_units: _Pair
    over_nodes: _Pair
    by_node: dict[str, _Pair]


class _Line(_Typed):
    """One round. Only of a quality is a number no mistake that is none: a model may have diverged."""

    round: Annotated[int, Field(ge=1, lt=2**63)]
    nodes: _Count = 0
    asked: _Count = 0
    accepted: _Count = 0
    refused: _Counts = {}
    dropped: _Count = 0
    dropped_by: _Counts = {}
    missing: _Count = 0
    changed: bool = True
    bytes_down_per_node: _Count = 0
    bytes_up_per_node: _Count = 0
    bytes_full_model: Annotated[int, Field(ge=1, lt=2**63)] = 1
    seconds: _Finite = 0.0
    accuracy: float = 0.0
    accuracy_without_experts: float = 0.0
    bits_per_byte: float = 0.0
    bits_per_byte_without_experts: float = 0.0
    order0_bits_per_byte: float = 0.0
    load: _Layers = []
    private_load: list[list[_Finite | None]] = []
    holders: list[list[_Count]] = []
    holders_mean: _Layers = []
    rounds_without_holder: list[list[_Count]] = []
    private_evaluation: _HeldOut | None = None


_ALWAYS = (
    "nodes", "accepted", "refused", "dropped", "missing",
    "bytes_down_per_node", "bytes_up_per_node", "bytes_full_model", "seconds",
)  # fmt: skip
_QUALITIES = (
    ("accuracy", "accuracy_without_experts"),
    ("bits_per_byte", "bits_per_byte_without_experts", "order0_bits_per_byte"),
)


def line_of(
    outcome: RoundOutcome, coverage: Mapping[str, Any], bytes_full_model: int, seconds: float
) -> dict[str, Any]:
    """Return a round's line.

    Args:
        coverage: what :meth:`conclave.server.rounds.coverage.Coverage.metrics` says after the round.
        bytes_full_model: of an exchange both ways with the whole model.
        seconds: that the round took.
    """
    public = {} if outcome.public is None else asdict(outcome.public)
    replies = outcome.replies
    return {
        "round": outcome.number,
        **{name: value for name, value in public.items() if value is not None},
        "nodes": outcome.nodes,
        "asked": outcome.asked,
        "accepted": replies.accepted,
        "refused": dict(replies.refused),
        "dropped": replies.dropped,
        "dropped_by": dict(replies.dropped_by),
        "missing": replies.missing,
        "changed": outcome.changed,
        "tensors_unchanged": outcome.unchanged_tensors,
        "bytes_down_per_node": round(outcome.bytes_down / max(1, outcome.asked)),
        "bytes_up_per_node": round(replies.bytes_up / max(1, replies.accepted)),
        "bytes_full_model": bytes_full_model,
        "seconds": round(seconds, 4),
        **({} if outcome.loads is None else {"private_load": outcome.loads}),
        **({} if outcome.private is None else {"private_evaluation": outcome.private.document()}),
        **coverage,
    }


def why_no_metrics(line: object) -> str | None:
    """Say what is wrong with a line of metrics, or what it lacks; None if nothing is wrong."""
    try:
        _Line.model_validate(line)
    except ValidationError as error:
        (first, *_) = error.errors()
        return ".".join(map(str, first["loc"])) + (": " if first["loc"] else "") + first["msg"].lower()
    return None


_ALIKE = (("load", "private_load"), ("holders_mean", "rounds_without_holder"))  # as many layers of as many experts


def lacking(metrics: Sequence[Mapping[str, Any]]) -> str | None:
    """Say what rounds lack to be summed up; None if they lack nothing. A quality is in all of them or in none."""
    last = metrics[-1]
    quality = next((names for names in _QUALITIES if names[0] in last), _QUALITIES[0] if "load" in last else ())
    for number, line in enumerate(metrics, start=1):
        for name in (*_ALWAYS, *quality):
            if name not in line:
                return f"line {number} has no {name}"
    for one, other in _ALIKE:
        if one in last and other in last and list(map(len, last[one])) != list(map(len, last[other])):
            return f"{one} and {other} of line {len(metrics)} are of other lengths"
    return None


def dropped_by(metrics: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return reason → dropped replies, the commonest first.

    Reasons are those of :data:`conclave.server.replies.validation.Reason`.

    Runs from before reasons were distinguished have theirs under ``other``.
    """
    total: Counter[str] = Counter()
    for line in metrics:
        total.update(line.get("dropped_by", {"other": line["dropped"]} if line["dropped"] else {}))
    return dict(total.most_common())


def unchanged(metrics: Iterable[Mapping[str, Any]]) -> int:
    """Return how many rounds changed nothing for lack of acceptable replies."""
    return sum(not line.get("changed", line["accepted"] > 0) for line in metrics)
