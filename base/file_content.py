"""What a file holds that somebody named, up to a size: a file may be larger than memory, or have no end."""

from __future__ import annotations

from pathlib import Path

from conclave.base.errors import BadInputError


def read_content(path: Path, refusal: str, most_bytes: int) -> bytes:
    """Read a file as a whole.

    Args:
        refusal: what to say where that fails: which file cannot be read, and what it must be.

    Raises:
        BadInputError: it cannot be read, or is larger than ``most_bytes``.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(most_bytes + 1)
    except OSError as error:
        raise BadInputError(f"{refusal}: {error.strerror}") from error
    if len(content) > most_bytes:
        raise BadInputError(f"{refusal}: it has more than {most_bytes} bytes")
    return content
