"""CSV files, plain or gz, read by pyarrow.

They have no types, and none are guessed: which columns are features must not depend on what rows hold. Each cell is
looked at by itself, so one that cannot be used costs its own row only.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from pyarrow import csv

from data.formats.arrow_rows import Numbered, Stored, read_columns
from data.formats.config import CsvConfig
from data.formats.files import files_in
from data.formats.identity import of_cells
from data.formats.rows import BadRow, Reading
from model.errors import BadInputError

_BLOCK_BYTES = 1 << 24
"""What is parsed at once, and so the longest row."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


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
            where = f"{file.relative_to(path)}, " if file != path else ""
            yield from _rows(file, config, names, columns, where)

    # What an owner calls columns that have no header changes no row.
    named = names if config.columns is None else [str(len(names))]
    return read_columns(path, config, names, set(names), rows, (config.delimiter, *named))


@contextmanager
def _reader(
    file: Path, config: CsvConfig, names: Sequence[str], bad: dict[int, str]
) -> Iterator[csv.CSVStreamingReader]:
    """Open a file; ``bad`` collects, by number, the rows that have more or fewer columns.

    Nothing is made of the cells of the columns ``names``: they come as bytes.
    pyarrow decodes such a row before it hands it over, and prints it where it is no UTF-8. So it never sees any such
    byte: every byte is given to it as the character of its number, names and cells are turned back by :func:`_bytes`.
    """
    first = 0 if config.columns is not None else 1  # pyarrow counts the header

    def skip(row: csv.InvalidRow) -> str:
        bad[row.number - first] = f"has {row.actual_columns} columns, must have {row.expected_columns}"
        return "skip"

    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix.lower() == ".gz" else file.read_bytes()
        yield csv.open_csv(
            io.BytesIO(content.removeprefix(_BYTE_ORDER_MARK).decode("latin-1").encode()),
            read_options=csv.ReadOptions(
                use_threads=False,  # with threads rows have no numbers
                block_size=_BLOCK_BYTES,
                column_names=None if config.columns is None else [_spelled(name) for name in config.columns],
            ),
            parse_options=csv.ParseOptions(
                delimiter=config.delimiter, newlines_in_values=True, invalid_row_handler=skip
            ),
            convert_options=csv.ConvertOptions(
                column_types={_spelled(name): pa.binary() for name in names},
                strings_can_be_null=False,
            ),
        )
    except (pa.ArrowException, OSError, EOFError, zlib.error, UnicodeError, MemoryError) as error:
        header = "a header" if config.columns is None else "rows"
        raise BadInputError(f"{file}: cannot be read, must be an undamaged CSV file with {header}") from error


def _spelled(name: str) -> str:
    return name.encode().decode("latin-1")


def _bytes(spelled: str) -> bytes:
    return spelled.encode("latin-1")


def _header(file: Path, config: CsvConfig) -> list[str]:
    if config.columns is not None:
        return list(config.columns)
    with _reader(file, config, (), {}) as reader:
        return [_bytes(name).decode() for name in reader.schema.names]


def _rows(
    file: Path, config: CsvConfig, names: Sequence[str], wanted: tuple[str, ...], where: str
) -> Iterator[Numbered | BadRow]:
    places = [names.index(name) for name in wanted]
    bad: dict[int, str] = {}
    number = 0

    def skipped() -> Iterator[BadRow]:
        nonlocal number
        number += 1
        while number in bad:
            yield BadRow(f"{where}row {number}", bad[number])
            number += 1

    with _reader(file, config, names, bad) as reader:
        for batch in reader:
            columns = [[_bytes(cell.decode()) for cell in column.to_pylist()] for column in batch.columns]
            for cells in zip(*columns, strict=True):
                yield from skipped()
                values = {name: cells[place] for name, place in zip(wanted, places, strict=True)}
                yield f"{where}row {number}", Stored(of_cells(cells), values)
    yield from skipped()
