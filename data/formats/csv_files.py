"""CSV files, plain or gz, read by pyarrow.

They have no types, and none are guessed: which columns are features must not depend on what rows hold. Each cell is
looked at by itself, so one that cannot be used costs its own row only.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from pyarrow import csv

from data.formats.arrow_rows import Numbered, read_columns, rows_of
from data.formats.config import CsvConfig
from data.formats.files import files_in
from data.formats.rows import BadRow, Reading
from model.errors import BadInputError

_BLOCK_BYTES = 1 << 24
"""What is parsed at once, and so the longest row."""


def read_csv(path: Path, config: CsvConfig) -> Reading:
    """Return the rows of a CSV file, or of all in a folder.

    Raises:
        BadInputError: a file cannot be read, files have different columns, or as :func:`read_columns` says.
    """
    files = files_in(path, (".csv", ".csv.gz"))
    headers = {file: _header(file, config) for file in files}
    names = headers[files[0]]
    for file, header in headers.items():
        if header != names:
            raise BadInputError(f"{file}: has other columns than {files[0].name}, must have the same in the same order")

    def rows(columns: tuple[str, ...]) -> Iterator[Numbered | BadRow]:
        for file in files:
            yield from _rows(file, config, columns, f"{file.relative_to(path)}, " if file != path else "")

    return read_columns(path, config, names, set(names), rows)


@contextmanager
def _reader(
    file: Path, config: CsvConfig, wanted: tuple[str, ...] | None, bad: dict[int, str]
) -> Iterator[csv.CSVStreamingReader]:
    """Open a file; ``bad`` collects, by number, the rows that have more or fewer columns."""
    first = 0 if config.columns is not None else 1  # pyarrow counts the header

    def skip(row: csv.InvalidRow) -> str:
        bad[row.number - first] = f"has {row.actual_columns} columns, must have {row.expected_columns}"
        return "skip"

    try:
        with gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb") as content:
            yield csv.open_csv(
                content,
                read_options=csv.ReadOptions(
                    use_threads=False,  # with threads rows have no numbers
                    block_size=_BLOCK_BYTES,
                    column_names=None if config.columns is None else list(config.columns),
                ),
                parse_options=csv.ParseOptions(
                    delimiter=config.delimiter, newlines_in_values=True, invalid_row_handler=skip
                ),
                convert_options=csv.ConvertOptions(
                    check_utf8=False,
                    include_columns=None if wanted is None else list(wanted),
                    column_types={name: pa.binary() for name in wanted or ()},
                    strings_can_be_null=False,
                ),
            )
    except (pa.ArrowException, OSError, EOFError, zlib.error, UnicodeError) as error:
        header = "a header" if config.columns is None else "rows"
        raise BadInputError(f"{file}: cannot be read, must be an undamaged CSV file with {header}") from error


def _header(file: Path, config: CsvConfig) -> list[str]:
    if config.columns is not None:
        return list(config.columns)
    with _reader(file, config, None, {}) as reader:
        return list(reader.schema.names)


def _rows(file: Path, config: CsvConfig, wanted: tuple[str, ...], where: str) -> Iterator[Numbered | BadRow]:
    bad: dict[int, str] = {}
    number = 0

    def skipped() -> Iterator[BadRow]:
        nonlocal number
        number += 1
        while number in bad:
            yield BadRow(f"{where}row {number}", bad[number])
            number += 1

    with _reader(file, config, wanted, bad) as reader:
        for values in rows_of(reader):
            yield from skipped()
            yield f"{where}row {number}", values
    yield from skipped()
