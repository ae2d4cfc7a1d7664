"""What a long-running process says on its terminal: one line an event, to standard error."""

from __future__ import annotations

import logging
import sys


def log_to_terminal() -> None:
    """Log from now on; of the libraries, warnings only."""
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    logging.getLogger("conclave").setLevel(logging.INFO)
    flower = logging.getLogger("flwr")  # has a handler of its own, which would say everything twice
    flower.handlers.clear()
    flower.setLevel(logging.WARNING)
