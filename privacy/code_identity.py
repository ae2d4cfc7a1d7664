"""Which code produced a release: a hash over the packages that touch private data."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

_PACKAGES = ("base", "model", "privacy", "data", "protocol", "clients")


@cache
def code_hash() -> str:
    """Return the SHA-256 over names and contents of the installed sources of the node's own packages."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
