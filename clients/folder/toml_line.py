"""One line of a file that Conclave writes for people: comments stand between lines, so no table is dumped whole."""

from __future__ import annotations

import tomli_w


def toml_line(key: str, value: str | int | float | list[str]) -> str:
    """Return ``key = value`` as TOML spells it, without an end of line. Raises TypeError for what TOML has not."""
    return tomli_w.dumps({key: value}).rstrip("\n")
