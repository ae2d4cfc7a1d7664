"""Files and documents that people hand over: as bytes up to a size, as text in UTF-8, as JSON."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from conclave.base.errors import BadInputError

MOST_BYTES = 1 << 28
"""What is read of a file: more than anything that people write, and than the longest run's metrics."""

_OTHERS = (  # the longer marks first: that of UTF-32 begins like that of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def read_text(path: Path, what: str) -> str:
    """Read a file as text: a byte order mark is dropped, and every line ends in a line feed alone.

    Args:
        what: the file must be, for messages.

    Raises:
        BadInputError: it cannot be read, is too large, or is not text in UTF-8.
    """
    refusal = f"{path}: cannot be read, must be {what}"
    content = read_content(path, refusal, MOST_BYTES)
    if (encoding := other_encoding(content)) is not None:
        raise BadInputError(f"{refusal}: it is text in {encoding}, must be saved as UTF-8")
    try:
        text = without_mark(content).decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise BadInputError(f"{refusal}: line {line} is no text in UTF-8, must be saved as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def without_mark(content: bytes) -> bytes:
    """Return a file's bytes without the byte order mark that some editors put before text in UTF-8."""
    return content.removeprefix(codecs.BOM_UTF8)


def other_encoding(content: bytes) -> str | None:
    """Return which other encoding of Unicode a file's first bytes name, if they name one.

    UTF-16 without a mark is recognised by its zero bytes: what people write begins with a character of ASCII.
    """
    for mark, encoding in _OTHERS:
        if content.startswith(mark):
            return encoding
    return "UTF-16" if b"\0" in content[:2] and content[:2] != b"\0\0" else None


def read_content(path: Path, refusal: str, most_bytes: int) -> bytes:
    """Read a file as a whole.

    Args:
        refusal: what to say if that fails: which file cannot be read, and what it must be.

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


def parse_json(text: str | bytes) -> Any:
    """Parse a document that can be written again: whatever is wrong with it is one kind of error.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or has an integer or a text that cannot be printed.
    """
    try:
        document = json.loads(text)
        json.dumps(document, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return document
