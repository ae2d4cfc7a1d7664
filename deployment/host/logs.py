"""What long-running processes say: one line an event to standard error, and what their children print to files."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Literal

_FILE_BYTES = 10_000_000
_OLD_FILES = 4


def log_to_terminal(log_format: Literal["text", "json"] = "text") -> None:
    """Log from now on; of the libraries, warnings only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonLines() if log_format == "json" else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("conclave").setLevel(logging.INFO)
    flower = logging.getLogger("flwr")  # has a handler of its own, which would say everything twice
    flower.handlers.clear()
    flower.setLevel(logging.WARNING)


class JsonLines(logging.Formatter):
    """An event as one JSON object: time (UTC), level, logger, message, and exception where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Spell an event."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        event = {"time": at, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return json.dumps(event)


class RotatingLog(RotatingFileHandler):
    """A log file, and its predecessors ``.1`` to ``.4``, of 10 MB each; their owner alone can read them."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            path, maxBytes=_FILE_BYTES, backupCount=_OLD_FILES, encoding="utf-8", delay=True, errors="replace"
        )

    def write(self, line: str) -> None:
        """Add a line."""
        self.emit(logging.makeLogRecord({"msg": line}))

    def close(self) -> None:
        """Close the file; what does not fit on a full disk is lost."""
        with contextlib.suppress(OSError):
            super().close()

    def _open(self) -> TextIOWrapper:
        stream = super()._open()
        os.fchmod(stream.fileno(), 0o600)
        return stream

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (the library's name)
        """Go on without the line: on a full disk, what it is about matters more than its log."""
