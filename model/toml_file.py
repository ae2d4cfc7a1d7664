"""Reading a TOML file that people wrote."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from model.errors import BadInputError


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """Read a file.

    Args:
        what: the file must be, for messages.

    Raises:
        BadInputError: it cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path}: cannot be read, must be {what} in TOML") from error
    except tomllib.TOMLDecodeError as error:
        raise BadInputError(f"{path}: not TOML: {error}") from error
    except RecursionError as error:
        raise BadInputError(f"{path}: nested too deeply, must be {what} in TOML") from error
