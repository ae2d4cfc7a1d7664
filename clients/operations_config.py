"""How a process runs on its machine: in which hours, what it may use, and how its owner watches it."""

from __future__ import annotations

import re
from datetime import time
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from conclave.base.frozen import Frozen


def within(hours: str, at: time) -> bool:
    """Return whether a time of day lies in hours such as ``20:00-06:00``, which end the next morning.

    The first minute belongs to them, the last does not; hours from a time to the same time are the whole day.
    """
    begin, end = _parse(hours)
    return begin <= at < end if begin < end else not end <= at < begin


def _parse(hours: str) -> tuple[time, time]:
    if not re.fullmatch(r"[0-9]{2}:[0-9]{2}-[0-9]{2}:[0-9]{2}", hours):  # a time in ISO 8601 may have a time zone
        raise ValueError("must be two times of day, like 20:00-06:00")
    begin, _, end = hours.partition("-")
    try:
        return time.fromisoformat(begin), time.fromisoformat(end)
    except ValueError as error:
        raise ValueError("must be two times of day, like 20:00-06:00") from error


def _checked(hours: str) -> str:
    _parse(hours)
    return hours


Hours = Annotated[str, AfterValidator(_checked)]
"""Two local times of day, ``HH:MM-HH:MM``."""


class LimitsConfig(Frozen):
    """What a node may use of its machine.

    threads: of training; if not given, as many as there are cores.
    memory_mb: MiB that each of the node's two processes may allocate. A round that does not fit is refused, and stays
        spent; ``policy.memory_mb`` keeps a server from asking for as much.
    hours: local times between which the node works; outside them it refuses with ``paused``.
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
