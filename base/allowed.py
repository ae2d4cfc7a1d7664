"""What a mechanism's options may be: words from a list, numbers in a range. Anything else is refused, never guessed.

A word that is not in the list would select another guarantee than the one asked for; a number out of range would end
in parameters that are not numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

from conclave.base.errors import BadInputError

MOST_UNITS = 10**12
MOST_BYTES = 2**60
FINITE = math.nextafter(math.inf, 0.0)
"""The largest number that is one."""


def check_word(name: str, value: object, allowed: Sequence[str]) -> None:
    """Check a word.

    Raises:
        BadInputError: it is not one of the allowed words.
    """
    if not isinstance(value, str) or value not in allowed:
        raise BadInputError(f"{name} is {value!r}, must be {_listed(allowed)}")


def check_number(name: str, value: object, least: float, most: float, *, above: bool = False) -> None:
    """Check a number; true and false are not numbers.

    Args:
        above: ``least`` itself is not allowed.

    Raises:
        BadInputError: it is not a number, or out of range.
    """
    low = f"above {least:g}" if above else f"at least {least:g}"
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not (least < number if above else least <= number) or not number <= most:
        raise BadInputError(f"{name} is {value!r}, must be {low} and at most {most:g}")


def check_whole(name: str, value: object, least: int, most: int, *, may_be_none: bool = False) -> None:
    """Check a whole number; true and false are not numbers.

    Raises:
        BadInputError: it is not a whole number, or out of range.
    """
    if value is None and may_be_none:
        return
    if not isinstance(value, Integral) or isinstance(value, bool) or not least <= int(value) <= most:
        kind = "None or a whole number" if may_be_none else "a whole number"
        raise BadInputError(f"{name} is {value!r}, must be at least {least} and at most {most:g}, {kind}")


def _listed(words: Sequence[str]) -> str:
    quoted = [f"'{word}'" for word in words]
    return f"{', '.join(quoted[:-1])} or {quoted[-1]}"
