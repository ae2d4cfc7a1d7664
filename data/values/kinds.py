"""What a single value means: a class, a number, a group; :mod:`conclave.data.values.names` gives its name.

No message here may repeat the value: it is private.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from functools import lru_cache

import numpy as np

from conclave.data.values.names import is_missing as is_missing
from conclave.data.values.names import name_of as name_of
from conclave.data.values.names import number_in
from conclave.data.values.rows import BadValueError

_PADDED = re.compile(r"[+-]?0[0-9]{1,17}(\.0*)?")
_ALSO = {"true": "1", "false": "0", "1": "true", "0": "false"}
"""Programs store true and false as 1 and 0, and a column of both as numbers where one is missing."""

_INFINITE = {
    f"{sign}{name}": -math.inf if sign == "-" else math.inf for sign in ("", "+", "-") for name in ("inf", "infinity")
}


def class_of(value: object, known: Mapping[str, int]) -> int:
    """Return the class of a label; ``known`` is :meth:`LabelledConfig.known`.

    Raises:
        BadValueError: it is not one of the known ones.
    """
    try:
        found = place_of(value, known)
    except BadValueError as error:
        raise BadValueError(f"the label {error}") from None
    if found is None:
        raise BadValueError("the label must be one of labels, or a number below classes")
    return found


def place_of(value: object, known: Mapping[str, int]) -> int | None:
    """Return the entry of ``known``, which is keyed by names, for a value's name.

    If that name is unknown, true and false also stand for 1 and 0 and the reverse, and 01 for 1: nothing else in the
    list could be meant.

    Raises:
        BadValueError: the value has no name.
    """
    name = name_of(value)
    if name in known:
        return known[name]
    if name in _ALSO:
        return known.get(_ALSO[name])
    if _PADDED.fullmatch(name) is not None:
        return known.get(str(int(name.partition(".")[0])))
    return None


def group_of(value: object, spelled_missing: frozenset[str] = frozenset()) -> str:
    """Return a group's name.

    Args:
        spelled_missing: as for :func:`number_of`.

    Raises:
        BadValueError: it has none.
    """
    try:
        name = name_of(value)
    except BadValueError as error:
        raise BadValueError(f"the group {error}") from None
    if name in _missing(spelled_missing).names:
        raise BadValueError("the group is missing, must be given")
    return name


def group_number(name: str) -> int:
    """Return a group's number: 63 bits of the SHA-256 of its name, so it never changes, whoever else is there."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") >> 1


def number_of(value: object, spelled_missing: frozenset[str]) -> float | None:
    """Return a finite number, or None where it is missing.

    Args:
        spelled_missing: what stands for a missing value. A number among them does so however it is spelled or stored.

    Raises:
        BadValueError: it is neither.
    """
    number, missing = math.nan, _missing(spelled_missing)
    if type(value) is float:
        if math.isnan(value):
            return None
        number = value
    elif isinstance(value, str | bytes | bytearray):
        text = (value if isinstance(value, str) else bytes(value).decode("utf-8", "replace")).strip()
        if not text or text in missing.spelled:
            return None
        try:
            number = math.nan if "_" in text else float(text)  # Python alone takes 1_000 for a number
        except ValueError:
            number = math.nan
    elif is_missing(value):
        return None
    elif isinstance(value, bool | np.bool_):
        return float(value)
    elif isinstance(value, int | float | Decimal | np.integer | np.floating):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    if missing.numbers:
        spelled = float(str(value)) if isinstance(value, np.floating) else number  # in its own precision
        if number in missing.numbers or spelled in missing.numbers:
            return None
    if not math.isfinite(number):
        raise BadValueError("must be a finite number")
    return number


def means_missing(value: object, spelled_missing: frozenset[str]) -> bool:
    """Whether there is no value, or one that stands for no value; ``spelled_missing`` is as for :func:`number_of`."""
    missing = _missing(spelled_missing)
    try:
        return is_missing(value) or name_of(value) in missing.names
    except BadValueError:  # infinity has no name
        return isinstance(value, float | np.floating | Decimal) and float(value) in missing.numbers


def missing_numbers(spelled_missing: Iterable[str]) -> frozenset[float]:
    """Return the numbers that stand for a missing value."""
    return _missing(frozenset(spelled_missing)).numbers


class _Missing:
    """What stands for a missing value: as spelled, by name and as a number."""

    def __init__(self, spelled: frozenset[str]) -> None:
        self.spelled = frozenset(text.strip() for text in spelled)
        self.names = frozenset(name_of(text) for text in spelled if not is_missing(text))
        found = (_INFINITE.get(name.lower(), number_in(name)) for name in self.names)
        self.numbers = frozenset(number for number in found if number is not None)


@lru_cache(maxsize=64)
def _missing(spelled: frozenset[str]) -> _Missing:
    return _Missing(spelled)
