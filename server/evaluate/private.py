"""What nodes measure on units that they hold out of training: asked for, checked, and combined into one figure."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message

from conclave.privacy.releases.private_metrics import PrivateMean, private_mean
from conclave.protocol.codec import body_of, decode, tensors_of
from conclave.protocol.messages import EvaluateReply, HeldOutSide, ProtocolError
from conclave.protocol.plan import Plan
from conclave.server.replies.receipts import ReceiptBook
from conclave.server.replies.validation import Asked, ChargeChecker, DroppedError, Reason, dropping

log = logging.getLogger("conclave.server")

_DEVIATIONS = 10.0


@dataclass
class PrivateEvaluation:
    """What one evaluation came to.

    metric: ``accuracy`` or ``bits_per_byte``. bound: of a unit's value, in its unit.
    over_units: mean over the units of all nodes that answered; None if it drowns in noise.
    by_node: fingerprint → mean over the node's units, or None. Its mean is the personal quality of the nodes.
    refused, dropped_by: as of a round's replies.
    """

    metric: str
    bound: float
    asked: int
    over_units: PrivateMean | None = None
    by_node: dict[str, PrivateMean | None] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)
    dropped_by: Counter[Reason] = field(default_factory=Counter)

    @property
    def over_nodes(self) -> PrivateMean | None:
        """Mean over the nodes whose own mean is known, each counting the same."""
        means = [mean for mean in self.by_node.values() if mean is not None]
        if not means:
            return None
        noise = math.hypot(*(mean.noise for mean in means)) / len(means)
        return PrivateMean(sum(mean.value for mean in means) / len(means), noise)

    def document(self) -> dict[str, Any]:
        """Return it as a line of metrics has it: means as [value, standard error from noise], in the metric's unit."""

        def pair(mean: PrivateMean | None) -> list[float] | None:
            return None if mean is None else [round(mean.value * self.bound, 6), round(mean.noise * self.bound, 6)]

        return {
            "metric": self.metric,
            "over_units": pair(self.over_units),
            "over_nodes": pair(self.over_nodes),
            "by_node": {name: pair(mean) for name, mean in sorted(self.by_node.items())},
            "asked": self.asked,
            "refused": dict(self.refused),
            "dropped_by": dict(self.dropped_by),
        }


def collect(
    plan: Plan, asked: Mapping[int, Asked], replies: Iterable[Message], receipts: ReceiptBook
) -> PrivateEvaluation:
    """Check the answers of one evaluation and pool them, except those that are missing, refusals or nonsense.

    Args:
        asked: Flower node id → what it was asked. All receipts that could be checked are kept in ``receipts``.
    """
    metric, bound = plan.metric
    outcome = PrivateEvaluation(metric, bound, asked=len(asked))
    checker = ChargeChecker(plan, receipts, "evaluate")
    waiting = dict(asked)
    noise = _noise(plan)
    total, answered = [0.0, 0.0], 0
    for reply in sorted(replies, key=lambda message: message.metadata.src_node_id):  # so sums do not depend on order
        question = waiting.pop(reply.metadata.src_node_id, None)
        if question is None or question.node.held_out is None:
            outcome.dropped_by["not-asked"] += 1
            continue
        name = question.node.fingerprint
        try:
            sums = _sums(reply, question, question.node.held_out, checker, plan)
        except DroppedError as error:
            outcome.dropped_by[error.reason] += 1
            log.warning("node %s: an evaluation was dropped (%s): %s", name, error.reason, error)
            continue
        except ProtocolError as error:
            outcome.refused[error.code] += 1
            log.warning("node %s did not evaluate: %s", name, error.code)
            continue
        outcome.by_node[name] = private_mean(sums, noise)
        total = [total[0] + sums[0], total[1] + sums[1]]
        answered += 1
    outcome.over_units = private_mean((total[0], total[1]), noise * math.sqrt(answered))
    return outcome


def _sums(reply: Message, asked: Asked, side: HeldOutSide, checker: ChargeChecker, plan: Plan) -> tuple[float, float]:
    if not reply.has_content():
        raise DroppedError("no-answer", "it failed to answer")
    with dropping():
        answer = decode(reply.content, EvaluateReply)
        checker.accept(answer, body_of(reply.content), asked, side)
        (sums,) = tensors_of(reply.content, plan.metric_shapes).values()
    units = asked.node.declared_size * side.share / (1.0 - side.share)
    noise = _DEVIATIONS * _noise(plan) + 1.0
    first, second = sums.tolist()
    if min(first, second) < -noise or first + second > 2.0 * units + _DEVIATIONS * math.sqrt(units) + 2.0 * noise:
        raise DroppedError("over-norm", "it claims other numbers of units than it can have")
    return first, second


def _noise(plan: Plan) -> float:
    """Return the standard deviation of the noise in a sum."""
    return 0.0 if plan.evaluation is None else plan.evaluation.noise_multiplier or 0.0
