"""Health and metrics for the machine's own monitoring: two pages on loopback, and nothing else."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.registry import Collector

from conclave.base.errors import BadInputError

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

HOST = "127.0.0.1"


@contextmanager
def monitoring(port: int | None, collector: Collector, health: Callable[[], Mapping[str, bool]]) -> Iterator[None]:
    """Within it, answer on a port of loopback; not at all if ``port`` is None.

    ``/metrics`` is in the text format of Prometheus, ``/health`` is 200 if all is well and 503 if not. Nothing that a
    process knows about itself (memory, processor time) is there: on a node it would depend on the private batches.

    Args:
        collector: makes the metrics when they are asked for.
        health: what → whether it is as it should be.

    Raises:
        BadInputError: the port is taken.
    """
    if port is None:
        yield
        return
    registry = CollectorRegistry()
    registry.register(collector)
    metrics = make_wsgi_app(registry)

    def answer(environment: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        if environment["PATH_INFO"] == "/metrics":
            page: Iterable[bytes] = metrics(environment, start)
            return page
        if environment["PATH_INFO"] != "/health":
            start("404 Not Found", [("Content-Type", "text/plain")])
            return [b"/health, or /metrics\n"]
        found = dict(health())
        start("200 OK" if all(found.values()) else "503 Service Unavailable", [("Content-Type", "application/json")])
        return [json.dumps(found).encode() + b"\n"]

    try:
        server = make_server(HOST, port, answer, server_class=ThreadingWSGIServer, handler_class=_Silent)
    except OSError as error:
        raise BadInputError(f"monitoring.metrics_port {port}: cannot be used ({error.strerror})") from error
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Silent(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: monitoring asks every few seconds."""
