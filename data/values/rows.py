"""What a format yields: rows that can be used, and rows that cannot, each judged by itself alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from conclave.base.errors import ConclaveError
from conclave.data.values.schema import Schema


class BadValueError(ConclaveError, ValueError):
    """A row cannot be used. The message says what is wrong and what is allowed, and never what the row holds."""


@dataclass(frozen=True)
class Row:
    """The records of one row, file or cell: one, or for text any number of windows.

    records: [records, …], of the schema's shape and type.
    identity: what the row, and each of its records, is known by; see :mod:`conclave.data.values.identity`.
    label: its class, None for text.
    group: its group's name.
    """

    records: np.ndarray
    identity: bytes = field(repr=False)
    label: int | None = None
    group: str | None = None


@dataclass(frozen=True)
class BadRow:
    """A row that is left out: where it is and why. For the owner's eyes only: both derive from private data."""

    where: str
    why: str


@dataclass(frozen=True)
class Reading:
    """A data set that is about to be read: what its records look like, and its rows one after the other.

    stored_as: what rows' identities depend on besides their content, such as the names of the columns. Public.
    """

    schema: Schema
    rows: Iterable[Row | BadRow]
    stored_as: tuple[str, ...] = ()


def attempt(where: str, make: Callable[[], Row]) -> Row | BadRow:
    """Return the row, or why there is none."""
    try:
        return make()
    except BadValueError as error:
        return BadRow(where, str(error))
