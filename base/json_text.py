"""Reading JSON that may be another than was written."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """Parse a document that can be written again: whatever is wrong with it is one kind of error.

    Raises:
        ValueError: it is no JSON, nested too deeply, or has an integer or a text that nothing can print.
    """
    try:
        document = json.loads(text)
        json.dumps(document, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return document
