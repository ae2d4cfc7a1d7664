"""What a check that attacks a claim can come to."""

from __future__ import annotations

from typing import Literal

Verdict = Literal["VIOLATED", "INCOMPLETE", "NOT_REFUTED"]
"""VIOLATED: the claim does not hold. INCOMPLETE: something that it rests on could not be looked at."""
