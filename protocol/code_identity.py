"""Which code produced a release: a hash over the folders that touch private data, on which node and auditor agree."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

FOLDERS = ("base", "model", "privacy", "data", "protocol", "clients")
"""What a node runs to answer, no more: a change elsewhere must not make nodes give up what they were charged for."""


@cache
def code_hash() -> str:
    """Return the SHA-256 over names and contents of the installed sources of the folders that a node runs."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
