"""The name of a value: the same in every format, however a program stored it.

A patient who is 12 in one file and 12.0 in the next must not become two. So a value is named by what it is, not
by its type or spelling; docs/data.md has the table. Two names for one value would be two units for one
person; two values that share a name are as bad for what is learned.

No message here may repeat the value: it is private.
"""

from __future__ import annotations

import math
import re
import unicodedata
import uuid
from datetime import UTC, date, datetime
from decimal import Decimal

import numpy as np

from conclave.data.values.rows import BadValueError

NAMING = "2"
"""Says how groups are named. Where names change, units would change sides: nodes that have run refuse to go on."""

_NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?P<whole>0|[1-9][0-9]*)?(?P<point>\.)?(?P<part>(?<=\.)[0-9]*)?"
    r"(?P<exponent>[eE](?:[+-][0-9]{1,4}|0|[1-9][0-9]{0,3}))?"
)
_INSTANT = re.compile(
    r"(?P<day>[0-9]{4}-[0-9]{2}-[0-9]{2})[T ](?P<minute>[0-9]{2}:[0-9]{2})(?P<second>:[0-9]{2})?"
    r"(?:(?<=:[0-9]{2}:[0-9]{2})\.(?P<part>[0-9]+))? ?(?P<zone>Z|[+-][0-9]{2}(?::?[0-9]{2})?)?"
)
_UUID = re.compile(r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
_TRUTH = {"true": "true", "True": "true", "TRUE": "true", "false": "false", "False": "false", "FALSE": "false"}
_COARSE = ("Y", "M", "W", "h", "m")
"""Units in which numpy spells a moment in its own way."""


def name_of(value: object) -> str:
    """Return the name of a value, as docs/data.md says.

    Raises:
        BadValueError: it is missing, or neither text, number, true or false, date nor UUID.
    """
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            raise BadValueError("must be text in UTF-8") from None
    if isinstance(value, str):
        return _of_text(value)
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, int | np.integer):
        return str(int(value))
    if isinstance(value, float | np.floating | Decimal) and math.isfinite(value):
        return _of_number(value)
    if isinstance(value, np.datetime64 | date) and not is_missing(value):
        return _of_moment(value)
    if isinstance(value, uuid.UUID):
        return str(value)
    raise BadValueError("is missing, must be given" if is_missing(value) else "must be text, a date or a finite number")


def is_missing(value: object) -> bool:
    """Whether there is no value: none at all, not a number, not a time, or blank text."""
    if isinstance(value, str | bytes):
        return not value.strip()
    if isinstance(value, np.datetime64):
        return bool(np.isnat(value))
    return value is None or (isinstance(value, float | np.floating | Decimal) and math.isnan(value))


def number_in(text: str) -> float | None:
    """Return the number that text spells; None if it spells none, or one that a double cannot hold."""
    match = _NUMBER.fullmatch(text)
    if match is None or not (match["whole"] or match["part"]):
        return None
    number = float(text)
    mantissa = f"{match['whole'] or ''}{match['part'] or ''}".strip("0")
    if math.isinf(number) or (number == 0.0 and mantissa):
        return None
    return number


def column_name(text: str) -> str:
    """Return the name of a column, without spaces around it, in composed Unicode (NFC)."""
    return unicodedata.normalize("NFC", text.strip())


def _of_text(text: str) -> str:
    name = text.strip()
    if name.endswith("\0"):  # fields of a fixed width are filled up so
        name = name.rstrip("\0").strip()
    if not name:
        raise BadValueError("is missing, must be given")
    if not name.isascii():
        return unicodedata.normalize("NFC", name)
    if name[0] in "0123456789-+.":
        if name[0] != "0" and name.isdigit():
            return name  # as nearly all are
        if (match := _NUMBER.fullmatch(name)) is not None:
            return _of_spelled(match) or name
        if (match := _INSTANT.fullmatch(name)) is not None:
            return _of_instant(match) or name
    if len(name) == 36 and _UUID.fullmatch(name) is not None:
        return name.lower()
    return _TRUTH.get(name, name)


def _of_spelled(match: re.Match[str]) -> str | None:
    """Return the name of a number that text spells; all digits of a whole number count, however many."""
    whole, part, exponent = match["whole"], match["part"], match["exponent"]
    if not (whole or part):
        return None
    if exponent is not None:
        if whole == "0" and match["point"] is None and exponent[1] not in "+-":
            return None  # no program writes 0 as 0e12: a code in hexadecimal
        number = number_in(match.string)
        return None if number is None else _of_double(number)
    if part and part.strip("0"):
        number = number_in(match.string)
        return None if number is None else _of_double(number)
    digits = whole or "0"
    return f"-{digits}" if match["sign"] == "-" and digits != "0" else digits


def _of_number(value: float | np.floating | Decimal) -> str:
    if value == int(value):
        return str(int(value))
    if isinstance(value, float | Decimal):
        return _of_double(float(value))
    return _of_double(float(str(value)))  # what its own precision needs: 0.1, and not all digits that are stored


def _of_double(number: float) -> str:
    return str(int(number)) if number.is_integer() else repr(number)


def _of_moment(value: np.datetime64 | date) -> str:
    if isinstance(value, np.datetime64):
        return _of_text(str(value.astype("datetime64[s]") if np.datetime_data(value)[0] in _COARSE else value))
    if isinstance(value, datetime) and value.tzinfo is not None:
        value = value.astimezone(UTC).replace(tzinfo=None)
    return _of_text(value.isoformat())


def _of_instant(match: re.Match[str]) -> str | None:
    """Return the name of a moment: for midnight that of the day, else the time in UTC with as few digits as needed."""
    spelled = f"{match['day']}T{match['minute']}{match['second'] or ':00'}"
    part = (match["part"] or "").rstrip("0")
    try:
        moment = datetime.fromisoformat(spelled + (match["zone"] or ""))
        if moment.tzinfo is not None:
            moment = moment.astimezone(UTC).replace(tzinfo=None)
    except (ValueError, OverflowError):  # of no calendar: text
        return None
    day, _, time = moment.isoformat().partition("T")
    if part:
        return f"{day}T{time}.{part}"
    return day if time == "00:00:00" else f"{day}T{time}"
