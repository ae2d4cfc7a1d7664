"""What a run's metrics, one mapping a round, come to over its rounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any


def dropped_by(metrics: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return reason → dropped replies, the commonest first; reasons are :data:`server.validation.Reason`.

    Runs from before reasons were told apart have theirs under ``other``.
    """
    total: Counter[str] = Counter()
    for line in metrics:
        total.update(line.get("dropped_by", {"other": line["dropped"]} if line["dropped"] else {}))
    return dict(total.most_common())


def unchanged(metrics: Iterable[Mapping[str, Any]]) -> int:
    """Return how many rounds changed nothing, for want of acceptable replies."""
    return sum(not line.get("changed", line["accepted"] > 0) for line in metrics)
