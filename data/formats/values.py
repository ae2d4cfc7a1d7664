"""What a single value means: a name, a class, a number, a group.

No message here may repeat the value: it is private.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from decimal import Decimal

import numpy as np

from data.formats.rows import BadValueError

_WHOLE = re.compile(r"(?P<number>[+-]?[0-9]{1,18})(\.0*)?")


def name_of(value: object) -> str:
    """Return how a value is called in label maps, categories and groups: a whole number as 1, whatever its type.

    Raises:
        BadValueError: it is missing, or neither text nor a number nor true or false.
    """
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            raise BadValueError("must be text in UTF-8") from None
    if isinstance(value, str):
        if not (name := value.strip()):
            raise BadValueError("is missing, must be given")
        return name
    if isinstance(value, bool | np.bool_):
        return str(bool(value)).lower()
    if isinstance(value, int | np.integer):
        return str(int(value))
    if isinstance(value, float | np.floating | Decimal) and math.isfinite(value):
        return str(int(value)) if value == int(value) else repr(float(value))
    raise BadValueError("is missing, must be given" if is_missing(value) else "must be text or a finite number")


def is_missing(value: object) -> bool:
    """Whether there is no value: none at all, not a number, or blank text."""
    if isinstance(value, str | bytes):
        return not value.strip()
    return value is None or (isinstance(value, float | np.floating | Decimal) and math.isnan(value))


def class_of(value: object, known: Mapping[str, int]) -> int:
    """Return the class of a label; ``known`` is :meth:`LabelledConfig.known`.

    Raises:
        BadValueError: it is none of the known ones.
    """
    try:
        found = place_of(value, known)
    except BadValueError as error:
        raise BadValueError(f"the label {error}") from None
    if found is None:
        raise BadValueError("the label must be one of labels, or a number below classes")
    return found


def place_of(value: object, known: Mapping[str, int]) -> int | None:
    """Return what ``known`` has for a value's name; text may also spell a whole number as 1.0, which is 1.

    Raises:
        BadValueError: the value has no name.
    """
    name = name_of(value)
    if name not in known and (whole := _WHOLE.fullmatch(name)):
        name = str(int(whole["number"]))
    return known.get(name)


def group_of(value: object) -> str:
    """Return a group's name.

    Raises:
        BadValueError: it has none.
    """
    try:
        return name_of(value)
    except BadValueError as error:
        raise BadValueError(f"the group {error}") from None


def group_number(name: str) -> int:
    """Return a group's number: 63 bits of the SHA-256 of its name, so its own for good, whoever else is there."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") >> 1


def number_of(value: object, spelled_missing: frozenset[str]) -> float | None:
    """Return a finite number, or None where it is missing.

    Raises:
        BadValueError: it is neither.
    """
    if isinstance(value, bytes | bytearray):
        value = bytes(value).decode("utf-8", "replace")
    if isinstance(value, str):
        text = value.strip()
        if text in spelled_missing:
            return None
        try:
            number = math.nan if "_" in text else float(text)  # Python alone takes 1_000 for a number
        except ValueError:
            number = math.nan
    elif is_missing(value):
        return None
    elif isinstance(value, bool | int | float | Decimal | np.bool_ | np.integer | np.floating):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    else:
        number = math.nan
    if not math.isfinite(number):
        raise BadValueError("must be a finite number")
    return number
