"""Rows of columns, however they are stored: of numbers, of text or of pictures."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from conclave.base.errors import BadInputError
from conclave.data.formats.config import ColumnsConfig
from conclave.data.values.config import PictureColumnConfig, TextColumnConfig
from conclave.data.values.features import Features
from conclave.data.values.identity import BYTES_OF_TEXT, cells_of, of_cells
from conclave.data.values.kinds import class_of, group_of
from conclave.data.values.names import column_name
from conclave.data.values.picture import picture_from
from conclave.data.values.rows import BadRow, BadValueError, Reading, Row, attempt
from conclave.data.values.schema import ImageSchema, Schema, TableSchema, TextSchema
from conclave.data.values.text import windows

Values = Mapping[str, object]
_UNREADABLE = object()
"""A value that is none of the kinds any column may hold."""
_PRECISE = {pa.float16(): np.float16, pa.float32(): np.float32}


class Stored(NamedTuple):
    """A row as it is stored: its identity, from all columns, and the values of the columns that are read."""

    identity: bytes
    values: Values


Numbered = tuple[str, Stored]
"""Where a row is, and the row."""


@dataclass(frozen=True)
class Columns:
    """The columns that are read, and what becomes of a row of them."""

    names: tuple[str, ...]
    schema: Schema
    record: Callable[[Values], np.ndarray]


def read_columns(
    path: Path,
    config: ColumnsConfig,
    names: Sequence[str],
    numbers: Collection[str],
    rows: Callable[[tuple[str, ...]], Iterable[Numbered | BadRow]],
    stored_as: tuple[str, ...],
) -> Reading:
    """Return the rows of a data set with columns.

    Args:
        path: for errors.
        names: those of all columns.
        numbers: the columns that are features by default, judged by the file's own types and never by its rows.
        rows: given the columns to read, yields rows, including those that cannot even be taken apart.
        stored_as: what identities depend on besides the content of a row.

    Raises:
        BadInputError: a column is missing or appears twice; there is no feature.
    """
    columns = _columns(path, config, names, numbers)
    extra = tuple(name for name in (config.label, config.group_by) if name is not None)
    for name in (*columns.names, *extra):
        if names.count(name) != 1:
            raise BadInputError(
                f"{path}: has {names.count(name)} columns named {name!r}, must have one; it has {', '.join(names)}"
                + _other_delimiter(names)
            )
    wanted = tuple(dict.fromkeys((*columns.names, *extra)))
    return Reading(columns.schema, _rows(config, columns, rows(wanted)), stored_as)


def _other_delimiter(names: Sequence[str]) -> str:
    """Return what may be the cause if the only name looks like several names."""
    several = [sign for sign in (";", "\t", ",", "|") if len(names) == 1 and sign in names[0]]
    return f", which looks like columns divided by {several[0]!r}: see delimiter" if several else ""


def _columns(path: Path, config: ColumnsConfig, names: Sequence[str], numbers: Collection[str]) -> Columns:
    if config.text is not None:
        return _text(config.text)
    if config.picture is not None:
        return _pictures(config.picture, config.labelled.class_count)
    others = [name for name in names if name not in (config.label, config.group_by)]
    usable = [name for name in others if name in numbers or name in config.categories]
    features = Features(config, usable if config.features is None else config.features, path)
    schema = TableSchema(features=features.count, classes=config.labelled.class_count)
    return Columns(features.columns, schema, lambda values: features.row(values)[np.newaxis])


def _text(config: TextColumnConfig) -> Columns:
    def record(values: Values) -> np.ndarray:
        value = values[config.column]
        if not isinstance(value, bytes):
            raise BadValueError(f"column {config.column!r} must be text")
        return windows(value, config.window)

    return Columns((config.column,), TextSchema(window=config.window), record)


def _pictures(config: PictureColumnConfig, classes: int) -> Columns:
    def record(values: Values) -> np.ndarray:
        value = values[config.column]
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):  # a path, say: no file is opened because a record says so
            raise BadValueError(f"column {config.column!r} must hold the bytes of a picture")
        return picture_from(content, config)[np.newaxis]

    schema = ImageSchema(image=(config.channels, config.height, config.width), classes=classes)
    return Columns((config.column,), schema, record)


def _rows(config: ColumnsConfig, columns: Columns, rows: Iterable[Numbered | BadRow]) -> Iterator[Row | BadRow]:
    known = None if config.label is None else config.labelled.known()
    spelled_missing = frozenset(config.missing_values)

    def make(row: Stored) -> Row:
        values = row.values
        label = None if known is None or config.label is None else class_of(values[config.label], known)
        group = None if config.group_by is None else group_of(values[config.group_by], spelled_missing)
        return Row(columns.record(values), row.identity, label, group)

    for row in rows:
        if isinstance(row, BadRow):
            yield row
        else:
            where, stored = row
            yield attempt(where, lambda stored=stored: make(stored))  # type: ignore[misc]  # bound at once


def rows_of(batches: Iterable[pa.RecordBatch], wanted: Sequence[str]) -> Iterator[Stored]:
    """Yield the rows of batches of all columns; text comes as bytes.

    Args:
        wanted: the names of the columns whose values are read, each present once.

    Raises:
        BadInputError: a column is of a type that no identity is defined for.
        pa.ArrowInvalid: a batch is damaged. Reading its values anyway could end the process.
    """
    for batch in batches:
        columns = [_undecoded(column) for column in batch.columns]
        for column in columns:
            column.validate(full=True)
        names = list(map(column_name, batch.schema.names))
        identities = map(of_cells, zip(*map(cells_of, columns, batch.schema.names), strict=True))
        values_by_column = [_values(columns[names.index(name)]) for name in wanted]
        for identity, values in zip(identities, zip(*values_by_column, strict=True), strict=True):
            yield Stored(identity, dict(zip(wanted, values, strict=True)))


def _undecoded(column: pa.Array) -> pa.Array:
    """Return text as bytes, in lists and structs too: text that is not UTF-8 must cost only its own row."""
    kind = _without_text(column.type)
    return column if kind.equals(column.type) else column.view(kind)


def _without_text(kind: pa.DataType) -> pa.DataType:
    if kind in BYTES_OF_TEXT:
        return BYTES_OF_TEXT[kind]
    if pa.types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, _without_text(kind.value_type), kind.ordered)
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_text(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_without_text(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_without_text(kind.value_type)))
    return kind


def _values(column: pa.Array) -> list[object]:
    """Return the values of a column; one that cannot be read must not hold back the others.

    Numbers of less precision than Python's, days and times come as numpy's: what a value is called depends on its own
    precision.
    """
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if column.type in _PRECISE:
        return list(np.array(column.to_pylist(), dtype=_PRECISE[column.type]))  # no value becomes not a number
    if pa.types.is_date(column.type) or pa.types.is_timestamp(column.type):
        return _moments(column)
    try:
        return list(column.to_pylist())
    except (pa.ArrowException, ValueError, OverflowError):  # a date of no calendar, say
        return [_value(cell) for cell in column]


def _moments(column: pa.Array) -> list[object]:
    """Return days and times, in UTC; pyarrow's own conversion would load pandas, and has no day before the year 1."""
    unit = "D" if pa.types.is_date32(column.type) else "ms" if pa.types.is_date64(column.type) else column.type.unit
    numbers = column.view(pa.int32() if column.type.bit_width == 32 else pa.int64()).to_pylist()
    nothing = np.iinfo(np.int64).min  # what numpy calls not a time
    values = np.array([nothing if number is None else number for number in numbers], dtype=np.int64)
    return list(values.view(f"datetime64[{unit}]"))


def _value(cell: pa.Scalar) -> object:
    try:
        return cell.as_py()
    except (pa.ArrowException, ValueError, OverflowError):
        return _UNREADABLE
