"""What a record is known by: a hash of what is stored, before it is converted in any way.

Which units are held out depends on it (:mod:`conclave.data.held_out`). So nothing enters that another decoder, or
another choice of columns and constants, would change: no pixel, no sample, no scale. A change of what is hashed here
would move records between the sides; then :data:`SCHEME` must change too, and nodes that have run refuse to go on.

Privacy: an identity says whether a record is a given one. It never leaves the node, and is neither logged nor stored.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from decimal import Decimal

import numpy as np
import pyarrow as pa

from conclave.base.errors import BadInputError

SIZE = 32
"""Bytes of an identity."""
SCHEME = "1"
"""Names what is hashed."""
BYTES_OF_TEXT = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
"""The types that show the bytes of text."""
_MISSING = b""
_EXACT = 2.0**53
"""Whole numbers of 64 bits below it are what their double says."""
_NANOSECONDS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}


def of_content(content: bytes) -> bytes:
    """Return the identity of a record that is a file, or a row of an array: the SHA-256 of its bytes, [SIZE]."""
    return hashlib.sha256(content).digest()


def of_cells(cells: Sequence[bytes]) -> bytes:
    """Return the identity of a row, [SIZE]: the SHA-256 of the cells of all columns, their number and their lengths."""
    return of_content(_joined(cells))


def _joined(cells: Sequence[bytes]) -> bytes:
    """Return one byte string per sequence: the number of cells and the length of each, 8 bytes each, then the cells."""
    return struct.pack(f"<{len(cells) + 1}Q", len(cells), *map(len, cells)) + b"".join(cells)


def cells_of(column: pa.Array, name: str) -> list[bytes]:
    """Return the values of a typed column as bytes, one for each row.

    They are identified by their values and not by their types, which programs choose by other rows: a column of
    whole numbers becomes one of floats when one of them is missing. Text and bytes are ``t`` and the bytes. Numbers,
    true and false are ``n`` and the little-endian double, or ``N`` and decimal digits where no double is exact. Dates
    and times are ``i`` and nanoseconds. Lists and structs are ``l`` and ``s``, the number of their parts, their lengths
    and the parts. A missing value, or one that is not a number, is empty.

    Args:
        name: of the column, for errors.

    Raises:
        BadInputError: the column's type is none of these.
    """
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        return cells_of(column.storage, name)  # not the values that a version with or without the extension makes of it
    if pa.types.is_dictionary(kind):
        return cells_of(column.dictionary_decode(), name)
    if pa.types.is_null(kind):
        return [_MISSING] * len(column)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return _numbers(column)
    if pa.types.is_decimal(kind):
        return [_MISSING if value is None else _number(value) for value in column.to_pylist()]
    if kind in BYTES_OF_TEXT:
        return cells_of(column.view(BYTES_OF_TEXT[kind]), name)
    if any(is_kind(kind) for is_kind in _BINARY):
        return [_MISSING if value is None else b"t" + value for value in column.to_pylist()]
    if pa.types.is_temporal(kind) and not pa.types.is_interval(kind):
        return _instants(column)
    if pa.types.is_struct(kind):
        return _structs(column, name)
    if pa.types.is_map(kind):
        return _lists(column.view(pa.list_(pa.struct([kind.key_field, kind.item_field]))), name)
    if any(is_kind(kind) for is_kind in _LISTS):
        return _lists(column, name)
    raise BadInputError(
        f"column {name!r} is of type {kind}, must be of text, bytes, numbers, times, or lists or structs of these"
    )


_BINARY = (
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
    pa.types.is_fixed_size_binary,
)
_LISTS = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)


def _numbers(column: pa.Array) -> list[bytes]:
    given = column.to_pylist()  # pyarrow's own way to numpy would load pandas
    values = np.array(given, dtype=np.float64)  # None becomes NaN
    packed = np.empty(len(values), dtype=[("tag", "u1"), ("double", "<f8")])
    packed["tag"], packed["double"] = ord("n"), values + 0.0  # so −0 is 0
    cells: list[bytes] = packed.view("V9").tolist()
    for row in np.flatnonzero(np.isnan(values)):
        cells[row] = _MISSING
    if pa.types.is_integer(column.type) and column.type.bit_width == 64:
        for row in np.flatnonzero(np.abs(values) >= _EXACT):
            cells[row] = _number(given[row])
    return cells


def _number(value: int | Decimal) -> bytes:
    double = float(value)
    if double == value:
        return b"n" + struct.pack("<d", double + 0.0)
    digits = str(value) if isinstance(value, int) else format(value, "f").rstrip("0")  # it has a point: it is not whole
    return b"N" + digits.encode()


def _instants(column: pa.Array) -> list[bytes]:
    """Return instants and spans without a calendar and time zones, whose tables change."""
    kind = column.type
    if pa.types.is_date32(kind):
        scale = 86_400 * 10**9
    else:
        scale = 10**6 if pa.types.is_date64(kind) else _NANOSECONDS[kind.unit]
    numbers = column.view(pa.int32() if kind.bit_width == 32 else pa.int64()).to_pylist()
    return [_MISSING if number is None else b"i%d" % (number * scale) for number in numbers]


def _lists(column: pa.Array, name: str) -> list[bytes]:
    parts, found, start = cells_of(column.flatten(), name), [], 0
    for length in column.value_lengths().to_pylist():
        if length is None:
            found.append(_MISSING)
            continue
        found.append(b"l" + _joined(parts[start : start + length]))
        start += length
    return found


def _structs(column: pa.Array, name: str) -> list[bytes]:
    parts = [cells_of(part, name) for part in column.flatten()]
    rows = zip(*parts, strict=True) if parts else ((),) * len(column)
    known = column.is_valid().to_pylist()
    return [b"s" + _joined(row) if is_known else _MISSING for row, is_known in zip(rows, known, strict=True)]
