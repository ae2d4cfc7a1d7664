"""Reading TOML that people wrote."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from conclave.base.errors import BadInputError
from conclave.base.reading import read_text

_MOST_BITS = 64
_DEEPEST = 64


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """Read a file.

    Args:
        what: the file must be, for messages.

    Raises:
        BadInputError: it cannot be read, or see :func:`parse_toml`.
    """
    return parse_toml(read_text(path, f"{what} in TOML"), where=str(path))


def parse_toml(text: str, *, where: str) -> dict[str, Any]:
    """Parse a document; ``where`` names its origin in errors.

    Raises:
        BadInputError: it is not TOML, or see :func:`load_toml`.
    """
    try:
        return load_toml(text, where=where)
    except tomllib.TOMLDecodeError as error:
        raise BadInputError(f"{where}: not TOML: {error}") from error


def load_toml(text: str, *, where: str) -> dict[str, Any]:
    """Parse what may not be TOML at all.

    Raises:
        TOMLDecodeError: it is not TOML.
        BadInputError: see :func:`refuse_extremes`.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except ValueError as error:  # Python reads no integer of thousands of decimal digits
        raise _too_long(where) from error
    except RecursionError as error:
        raise _too_deep(where) from error
    refuse_extremes(document, where=where)
    return document


def refuse_extremes(value: object, *, where: str, depth: int = 0) -> None:
    """Refuse what could be neither checked nor shown: Python reads hexadecimal integers that it then cannot print.

    Raises:
        BadInputError: an integer has more bits than TOML's, a text has a character that ends those of the system, or
            tables and arrays are nested too deeply.
    """
    if depth > _DEEPEST:
        raise _too_deep(where)
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise _too_long(where)
    if isinstance(value, str) and "\0" in value:
        raise BadInputError(f"{where}: {value!r} has the character U+0000, must be text that can be a name or a path")
    if isinstance(value, dict | list):
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            refuse_extremes(item, where=where, depth=depth + 1)


def _too_long(where: str) -> BadInputError:
    return BadInputError(f"{where}: an integer is too long, must have at most {_MOST_BITS} bits")


def _too_deep(where: str) -> BadInputError:
    return BadInputError(f"{where}: nested too deeply, must be at most {_DEEPEST} tables and arrays in one another")
