"""The hours in which a node works: its owner's machines may have other work by day."""

from __future__ import annotations

import re
from datetime import time
from typing import Annotated

from pydantic import AfterValidator


def within(hours: str, at: time) -> bool:
    """Return whether a time of day lies in hours such as ``20:00-06:00``, which end the next morning.

    The first minute belongs to them, the last does not; from a time to itself is the whole day.
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
