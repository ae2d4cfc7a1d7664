"""Rows of columns, however they are stored: of numbers, of text or of pictures."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from data.formats.config import ColumnsConfig
from data.formats.config_parts import PictureColumnConfig, TextColumnConfig
from data.formats.features import Features
from data.formats.picture import picture_from
from data.formats.rows import BadRow, BadValueError, Reading, Row, attempt
from data.formats.text import windows
from data.formats.values import class_of, group_of
from data.schema import ImageSchema, Schema, TableSchema, TextSchema
from model.errors import BadInputError

Values = Mapping[str, object]
Numbered = tuple[str, Values]
"""Where a row is, and its values by column."""
_UNREADABLE = object()
"""A value that is none of the kinds any column may hold."""


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
) -> Reading:
    """Return the rows of a data set with columns.

    Args:
        path: for errors.
        names: of all columns.
        numbers: the columns that hold numbers, as far as the file's own types tell and never its rows.
        rows: given the columns to read, yields rows, and those that cannot even be taken apart.

    Raises:
        BadInputError: a column is missing or there twice; there is no feature.
    """
    columns = _columns(path, config, names, numbers)
    extra = tuple(name for name in (config.label, config.group_by) if name is not None)
    for name in (*columns.names, *extra):
        if names.count(name) != 1:
            raise BadInputError(f"{path}: has {names.count(name)} columns named {name!r}, must have one")
    return Reading(columns.schema, _rows(config, columns, rows(tuple(dict.fromkeys((*columns.names, *extra))))))


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

    def make(values: Values) -> Row:
        label = None if known is None or config.label is None else class_of(values[config.label], known)
        group = None if config.group_by is None else group_of(values[config.group_by])
        return Row(columns.record(values), label, group)

    for row in rows:
        if isinstance(row, BadRow):
            yield row
        else:
            where, values = row
            yield attempt(where, lambda values=values: make(values))  # type: ignore[misc]  # bound at once


@dataclass(frozen=True)
class Layout:
    """The columns of a typed file; ``numbers`` are those whose type is a number's, or true and false."""

    types: pa.Schema
    names: tuple[str, ...]
    numbers: frozenset[str]

    @classmethod
    def of(cls, types: pa.Schema) -> Layout:
        """Return the layout; raises a UnicodeError where names are damaged."""
        kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean)
        numbers = (field.name for field in types if any(is_kind(field.type) for is_kind in kinds))
        return cls(types, tuple(types.names), frozenset(numbers))


def rows_of(batches: Iterable[pa.RecordBatch]) -> Iterator[Values]:
    """Yield the rows of batches; text comes as bytes.

    Raises:
        pa.ArrowInvalid: a batch is damaged. Reading its values as they stand could end the process.
    """
    for batch in batches:
        columns = [_undecoded(column) for column in batch.columns]
        for column in columns:
            column.validate(full=True)
        values_by_column = [_values(column) for column in columns]
        for values in zip(*values_by_column, strict=True):
            yield dict(zip(batch.schema.names, values, strict=True))


def _undecoded(column: pa.Array) -> pa.Array:
    """Return text as bytes: what is no UTF-8 must cost its own row only."""
    if pa.types.is_string(column.type):
        return column.view(pa.binary())
    return column.view(pa.large_binary()) if pa.types.is_large_string(column.type) else column


def _values(column: pa.Array) -> list[object]:
    """Return the values of a column; one that cannot be had must not keep the others back."""
    try:
        return list(column.to_pylist())
    except (pa.ArrowException, ValueError, OverflowError):  # a date of no calendar, say
        return [_value(cell) for cell in column]


def _value(cell: pa.Scalar) -> object:
    try:
        return cell.as_py()
    except (pa.ArrowException, ValueError, OverflowError):
        return _UNREADABLE
