"""The columns of typed files: their names, which of them hold numbers, and whether several files agree on them.

Programs choose a column's type by its rows: whole numbers become floats if one is missing, text is short
or long, and a column without any value has no type. Where the values agree the files are one data set.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from conclave.base.errors import BadInputError
from conclave.data.values.identity import BYTES_OF_TEXT
from conclave.data.values.names import column_name

_INDEX = re.compile(r"(__index_level_[0-9]+__|Unnamed: [0-9]+)?")
"""What pandas calls an index that has no name in Parquet, and in CSV once and again."""
_NUMBERS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean)
_TEXT = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
_MOMENTS = (pa.types.is_date, pa.types.is_timestamp)


@dataclass(frozen=True)
class Layout:
    """The columns of a data set.

    names: as they are called; see :func:`conclave.data.values.names.column_name`.
    stored: as they are stored.
    numbers: features unless the owner says otherwise: with numbers, or true and false, in every file that
        has values for them, without an index that pandas added.
    """

    names: tuple[str, ...]
    stored: tuple[str, ...]
    numbers: frozenset[str]


def layout_of(types: Mapping[Path, pa.Schema]) -> Layout:
    """Return the columns of files that are one data set.

    Raises:
        BadInputError: they have different columns, or values of different kinds in one column.
        UnicodeError: names are damaged.
    """
    files = list(types)
    first = types[files[0]]
    names = tuple(map(column_name, first.names))
    kinds: dict[str, tuple[str, Path]] = {}
    for file in files:
        same_columns(file, list(map(column_name, types[file].names)), files[0], names)
        for name, field in zip(names, types[file], strict=True):
            kind = _kind(field.type)
            before, where = kinds.setdefault(name, (kind, file))
            if "nothing" in (kind, before):
                kinds[name] = (kind, file) if before == "nothing" else (before, where)
            elif kind != before and names.count(name) == 1:
                was = types[where].field(names.index(name)).type
                raise BadInputError(
                    f"{file}: has other columns than {where.name}: column {name!r} is of type {field.type}, and "
                    f"{was} there; must hold the same kind of values in every file"
                )
    index = {column for file in files for column in _indices(types[file])}
    numbers = (name for name, (kind, _) in kinds.items() if kind == "numbers" and name not in index)
    return Layout(names, tuple(first.names), frozenset(numbers))


def same_columns(file: Path, names: Sequence[str], first: Path, expected: Sequence[str]) -> None:
    """Check that a file has the columns of the data set's first one.

    Raises:
        BadInputError: it has others, or another order.
    """
    if list(names) == list(expected):
        return
    if sorted(names) == sorted(expected):
        place = next(i for i, (name, other) in enumerate(zip(names, expected, strict=True)) if name != other)
        found = f"column {place + 1} is {names[place]!r}, and {expected[place]!r} there"
    else:
        more, less = Counter(names) - Counter(expected), Counter(expected) - Counter(names)
        found = "; ".join(
            f"{what} {', '.join(map(repr, columns.elements()))}"
            for what, columns in (("has", more), ("lacks", less))
            if columns
        )
    raise BadInputError(f"{file}: has other columns than {first.name}, must have the same in the same order: {found}")


def is_index(name: str) -> bool:
    """Whether a column only numbers rows: one without a name, or one that pandas added."""
    return _INDEX.fullmatch(name) is not None


def _kind(type_: pa.DataType) -> str:
    """Return the kind of a type's values; types of one kind give equal values equal names and identities."""
    if isinstance(type_, pa.BaseExtensionType):
        return str(type_)
    if pa.types.is_dictionary(type_):
        return _kind(type_.value_type)
    if pa.types.is_null(type_):
        return "nothing"
    if type_ in BYTES_OF_TEXT or any(is_kind(type_) for is_kind in _TEXT):
        return "text"
    if any(is_kind(type_) for is_kind in _NUMBERS):
        return "numbers"
    if any(is_kind(type_) for is_kind in _MOMENTS):
        return "moments"
    if pa.types.is_struct(type_):
        return f"structs of {', '.join(f'{field.name}: {_kind(field.type)}' for field in type_)}"
    if any(is_kind(type_) for is_kind in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)):
        return f"lists of {_kind(type_.value_type)}"
    return str(type_)


def _indices(types: pa.Schema) -> list[str]:
    """Return the columns that pandas wrote as its index: they only number or name rows."""
    named = [name for name in map(column_name, types.names) if is_index(name)]
    try:
        described = json.loads((types.metadata or {}).get(b"pandas", b"{}"))
        return named + [column_name(name) for name in described["index_columns"] if isinstance(name, str)]
    except (ValueError, TypeError, KeyError, RecursionError):
        return named
