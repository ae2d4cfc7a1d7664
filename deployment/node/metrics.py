"""What a node tells its owner's monitoring: only what the server knows too, or what does not depend on the records.

No batch sizes, durations, non-finite counts, memory or processor time: on a node they depend on secret samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from flwr.app import Message
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from conclave.clients.node import Node
from conclave.deployment.flower.machine_metrics import machine_metrics
from conclave.protocol.codec import refusal_code


class NodeMetrics(Collector):
    """Counts a node's answers, and collects the rest when it is asked for."""

    def __init__(self, node: Node, programs: Callable[[], Mapping[str, bool]], ca: Path, state: Path) -> None:
        self._node = node
        self._programs = programs
        self._ca, self._state = ca, state
        self._answers: Counter[tuple[str, str]] = Counter()

    def count(self, message: Message, reply: Message) -> None:
        """Count an answer by what was asked and, if it was refused, by the code that the server saw."""
        code = refusal_code(reply.content) if reply.has_content() else "internal-error"
        self._answers[message.metadata.message_type, code or "answered"] += 1

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now."""
        yield from machine_metrics(self._programs(), [self._ca], self._state)
        answers = CounterMetricFamily(
            "conclave_node_answers", "Answers to the server, by question and outcome.", labels=["question", "outcome"]
        )
        for (question, outcome), count in sorted(self._answers.items()):
            answers.add_metric([question, outcome], count)
        yield answers
        spent = GaugeMetricFamily("conclave_epsilon_spent", "Epsilon charged so far.", labels=["side"])
        budget = GaugeMetricFamily("conclave_epsilon_budget", "Epsilon that may ever be spent.", labels=["side"])
        ledgers = {"training": self._node.ledger}
        if self._node.held_out is not None:
            ledgers["held-out"] = self._node.held_out.ledger
        for side, ledger in ledgers.items():
            spent.add_metric([side], ledger.epsilon_spent)
            budget.add_metric([side], float(ledger.genesis.epsilon))
        yield from (spent, budget)
        approvals = self._node.approvals
        if approvals is None:
            return
        paused = GaugeMetricFamily("conclave_node_paused", "Whether the owner paused the node.")
        paused.add_metric([], float(approvals.paused))
        working = GaugeMetricFamily("conclave_node_in_hours", "Whether it is one of the node's hours.")
        working.add_metric([], float(approvals.open))
        waiting = GaugeMetricFamily("conclave_node_plans_waiting", "Plans that wait for the owner's approval.")
        waiting.add_metric([], approvals.count_waiting())
        yield from (paused, working, waiting)
