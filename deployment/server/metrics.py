"""What a server tells its machine's monitoring: programs, runs, rounds, replies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from conclave.base.errors import BadInputError, UnavailableError
from conclave.deployment.flower.machine_metrics import machine_metrics
from conclave.deployment.operator.flower_control import Control
from conclave.deployment.server.directory import ServerDirectory
from conclave.server.run_directory import RunDirectory


class ServerMetrics(Collector):
    """Collects metrics when they are asked for. Counters begin with the process."""

    def __init__(
        self, server: ServerDirectory, programs: Callable[[], Mapping[str, bool]], control: Callable[[], Control]
    ) -> None:
        self._server, self._programs, self.control = server, programs, control
        self._replies: Counter[str] = Counter()
        self._rounds = 0
        self.running: RunDirectory | None = None

    def count_round(self, line: Mapping[str, Any]) -> None:
        """Count what a round came to: a line of a run's metrics."""
        self._rounds += 1
        self._replies.update({"accepted": line["accepted"], "missing": line["missing"]})
        self._replies.update({f"refused:{code}": count for code, count in line["refused"].items()})
        self._replies.update({f"dropped:{reason}": count for reason, count in line["dropped_by"].items()})

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now."""
        server = self._server
        yield from machine_metrics(self._programs(), [server.tls / "server.pem", server.tls / "ca.pem"], server.state)
        rounds = CounterMetricFamily("conclave_server_rounds", "Rounds since the server started.")
        rounds.add_metric([], self._rounds)
        replies = CounterMetricFamily("conclave_server_replies", "Replies to rounds, by outcome.", labels=["outcome"])
        for outcome, count in sorted(self._replies.items()):
            replies.add_metric([outcome], count)
        running = GaugeMetricFamily("conclave_server_running", "1 while this run is going on.", labels=["run"])
        if self.running is not None:
            running.add_metric([self.running.path.name], 1.0)
        nodes = GaugeMetricFamily("conclave_server_nodes", "Enrolled nodes, by state.", labels=["state"])
        try:
            with self.control() as control:
                states = Counter(state for _, state in control.nodes())
        except (BadInputError, UnavailableError):  # it is starting; the programs' own metric says so
            states = Counter()
        for state, count in sorted(states.items()):
            nodes.add_metric([state], count)
        yield from (rounds, replies, running, nodes)
