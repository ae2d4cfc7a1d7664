"""Keep libraries from calling out: no telemetry, no update checks, no hub (docs/privacy.md, rule 14)."""

from __future__ import annotations

import os

SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""The libraries' own switches. They read them when they are imported, and so do programs that are started from here."""


def silence() -> None:
    """Set the switches, whatever they were; must run before the libraries are imported."""
    os.environ.update(SWITCHES)
