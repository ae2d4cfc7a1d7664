"""What one round came to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from conclave.model.experts.config import HeldExperts
from conclave.server.aggregate.balancing import Loads
from conclave.server.evaluate.private import PrivateEvaluation
from conclave.server.evaluate.public import Evaluation
from conclave.server.replies.validation import Reason


@dataclass(frozen=True)
class Replies:
    """The replies of a round, counted.

    refused: code → nodes that refused with it. dropped_by: reason → replies that did not count for it. missing: nodes
    that sent nothing in time. trained: the experts of each accepted reply. bytes_up: Flower's objects on the wire.
    """

    refused: Counter[str]
    dropped_by: Counter[Reason]
    missing: int
    trained: tuple[HeldExperts, ...]
    bytes_up: int

    @property
    def accepted(self) -> int:
        """Replies that counted."""
        return len(self.trained)

    @property
    def dropped(self) -> int:
        """Replies that did not count, for whatever reason."""
        return self.dropped_by.total()


@dataclass(frozen=True)
class RoundOutcome:
    """What one round came to.

    nodes: that were there. asked: of these. bytes_down: of all requests, Flower's objects on the wire.
    changed: whether the model moved; with too few acceptable replies nothing does. unchanged_tensors: of those of a
    model that moved, how many kept their value.
    loads: None where nothing is balanced, or nothing changed.
    public: the published model on public records; None where there are none.
    private: what nodes measured on held-out units after the round; None where nothing was due.
    """

    number: int
    nodes: int
    asked: int
    bytes_down: int
    replies: Replies
    changed: bool
    unchanged_tensors: int
    loads: Loads | None = None
    public: Evaluation | None = None
    private: PrivateEvaluation | None = None

    def sentence(self, rounds: int, seconds: float) -> str:
        """Say it in one line.

        Args:
            rounds: of the run. seconds: that this one took.
        """
        parts = [] if self.public is None else [f"loss {self.public.loss:.4f}"]
        parts.append(f"{self.replies.accepted} of {self.asked} replies")
        if self.private is not None and self.private.over_units is not None:
            mean = self.private.over_units
            parts.append(f"{self.private.metric} on held-out units {mean.value * self.private.bound:.4f}")
        return f"round {self.number} of {rounds}: {', '.join(parts)}, {seconds:.1f} s"
