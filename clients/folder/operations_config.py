"""How a process runs on its machine: what it may use, and how its owner watches it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from conclave.base.frozen import Frozen
from conclave.clients.hours import Hours


class LimitsConfig(Frozen):
    """What a node may use of its machine.

    threads: of training; as many as there are cores where it is not given.
    memory_mb: MiB that each of the node's two processes may allocate. A round that does not fit is refused, and stays
        spent; ``policy.memory_mb`` keeps a server from asking for as much.
    hours: local times between which the node works; outside of them it refuses with ``paused``.
    """

    threads: int | None = Field(default=None, ge=1, le=1024)
    memory_mb: int | None = Field(default=None, ge=512, le=2**30)
    hours: Hours | None = None


class MonitoringConfig(Frozen):
    """How a process is watched.

    log_format: of the lines on standard error; ``json`` is one object a line.
    metrics_port: where health and metrics are, on loopback only; nowhere if it is not given.
    """

    log_format: Literal["text", "json"] = "text"
    metrics_port: int | None = Field(default=None, ge=1, le=65_535)
