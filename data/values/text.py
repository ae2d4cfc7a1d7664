"""Text as bytes, cut into records."""

from __future__ import annotations

import numpy as np

from conclave.data.values.rows import BadValueError


def windows(content: bytes, window: int) -> np.ndarray:
    """Return disjoint windows, uint8 [windows, window]; a tail shorter than a window is dropped.

    Raises:
        BadValueError: the text is shorter than one window.
    """
    whole = len(content) // window
    if not whole:
        raise BadValueError(f"must have the {window} bytes of a window at least")
    return np.frombuffer(content, dtype=np.uint8, count=whole * window).reshape(whole, window)
