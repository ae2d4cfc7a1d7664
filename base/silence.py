"""Keep libraries from calling out: no telemetry, no update checks, no hub (docs/privacy.md, rule 14)."""

from __future__ import annotations

import os


def silence() -> None:
    """Set the libraries' own switches; must run before they are imported."""
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_DATASETS_OFFLINE"] = "1"
