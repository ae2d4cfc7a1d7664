"""CSV files, plain or gz, read by pyarrow.

They have no types, and none are guessed: which columns are features must not depend on the rows. Each cell is
looked at by itself, so a cell that cannot be used costs only its own row.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
from pyarrow import csv

from conclave.base.errors import BadInputError
from conclave.data.formats.arrow_rows import Numbered, Stored, read_columns
from conclave.data.formats.config import CsvConfig
from conclave.data.formats.files import files_in
from conclave.data.formats.layout import is_index, same_columns
from conclave.data.values.identity import of_cells
from conclave.data.values.names import column_name
from conclave.data.values.rows import BadRow, Reading

_BLOCK_BYTES = 1 << 24
"""What is parsed at once, and so the longest row."""
_ROWS_AT_ONCE = 4096
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_OTHER_MARKS = {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"PK\x03\x04": "a workbook",
    b"\xd0\xcf\x11\xe0": "a workbook",
}
"""How files begin that programs save beside CSV."""


def read_csv(path: Path, config: CsvConfig) -> Reading:
    """Return the rows of a CSV file, or of all in a folder.

    Raises:
        BadInputError: a file cannot be read, files have different columns, or as :func:`read_columns` says.
    """
    files = files_in(path, (".csv", ".csv.gz"))
    headers = {file: _header(file, config) for file in files}
    stored = headers[files[0]]
    names = tuple(map(column_name, stored))
    for file, header in headers.items():
        same_columns(file, list(map(column_name, header)), files[0], names)

    def rows(columns: tuple[str, ...]) -> Iterator[Numbered | BadRow]:
        for file in files:
            where = f"{file.relative_to(path)}, " if file != path else ""
            yield from _rows(file, config, headers[file], columns, where)

    # What an owner calls columns that have no header changes no row.
    named = stored if config.columns is None else [str(len(names))]
    usable = {name for name in names if not is_index(name)}
    return read_columns(path, config, names, usable, rows, (config.delimiter, *named))


def _content(file: Path, config: CsvConfig) -> bytes:
    """Return what a file holds, without a byte order mark.

    Raises:
        BadInputError: it cannot be read, is empty, or begins like a file that is not text in UTF-8.
    """
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix.lower() == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error, MemoryError) as error:
        raise _unreadable(file, config) from error
    if not content.strip():
        raise BadInputError(f"{file}: is empty, must be an undamaged CSV file with {_expected(config)}")
    for mark, kind in _OTHER_MARKS.items():
        if content.startswith(mark):
            raise BadInputError(f"{file}: is {kind}, must be CSV in UTF-8: save it as that")
    content = content.removeprefix(_BYTE_ORDER_MARK)
    if b"\0" in _first_record(content):
        raise BadInputError(
            f"{file}: begins with zero bytes, as UTF-16 has them, must be CSV in UTF-8: save it as that"
        )
    return content


def _first_record(content: bytes) -> bytes:
    """Return a file's first row, with the blank lines before it; quotation marks may enclose ends of lines."""
    end = len(content) - len(content.lstrip(b"\r\n"))
    while True:
        ends = [place for place in (content.find(b"\n", end), content.find(b"\r", end)) if place >= 0]
        if not ends:
            return content
        end = min(ends) + 1
        if content.count(b'"', 0, end) % 2 == 0:
            return content[:end]


def _parsed(file: Path, content: bytes, config: CsvConfig, names: Sequence[str], bad: dict[int, str]) -> pa.Table:
    """Parse a file's content; ``bad`` collects, by number, the rows that have more or fewer columns.

    The cells of the columns ``names`` are not converted: they come as bytes.
    pyarrow decodes such a row before it hands it over, and prints it if it is not UTF-8. So it never sees any such
    byte: every byte is given to it as the character of its number, names and cells are turned back by :func:`_bytes`.
    It reads from its own memory: its threads release a Python object at any time, and if
    the interpreter ends in the meantime, they abort the process.

    Args:
        names: those of all columns, as stored.

    Raises:
        BadInputError: it is damaged.
    """
    first = 0 if config.columns is not None else 1  # pyarrow counts the header

    def skip(row: csv.InvalidRow) -> str:
        bad[row.number - first] = f"has {row.actual_columns} columns, must have {row.expected_columns}"
        return "skip"

    try:
        with pa.BufferOutputStream() as memory:
            memory.write(content.decode("latin-1").encode())
            own = memory.getvalue()
        with pa.BufferReader(own) as source:
            return csv.read_csv(
                source,
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
    except (pa.ArrowException, MemoryError) as error:
        raise _unreadable(file, config) from error


def _unreadable(file: Path, config: CsvConfig) -> BadInputError:
    return BadInputError(f"{file}: cannot be read, must be an undamaged CSV file with {_expected(config)}")


def _expected(config: CsvConfig) -> str:
    return "a header" if config.columns is None else "rows"


def _spelled(name: str) -> str:
    return name.encode().decode("latin-1")


def _bytes(spelled: str) -> bytes:
    return spelled.encode("latin-1")


def _header(file: Path, config: CsvConfig) -> list[str]:
    if config.columns is not None:
        return list(config.columns)
    header = _first_record(_content(file, config))
    names = _parsed(file, header.rstrip(b"\r\n") + b"\n", config, (), {}).schema.names
    try:
        return [_bytes(name).decode() for name in names]
    except UnicodeError as error:
        raise BadInputError(f"{file}: its header is not text in UTF-8, must be: save the file as that") from error


def _rows(
    file: Path, config: CsvConfig, names: Sequence[str], wanted: tuple[str, ...], where: str
) -> Iterator[Numbered | BadRow]:
    """Yield a file's rows; ``names`` are its columns as they are stored, ``wanted`` as they are called."""
    called = list(map(column_name, names))
    places = [called.index(name) for name in wanted]
    bad: dict[int, str] = {}
    number = 0

    def skipped() -> Iterator[BadRow]:
        nonlocal number
        number += 1
        while number in bad:
            yield BadRow(f"{where}row {number}", bad[number])
            number += 1

    content = _content(file, config)
    if config.columns is None and len(_first_record(content)) == len(content):
        return  # a header alone, which pyarrow takes for damage where no end of line follows
    table = _parsed(file, content, config, names, bad)
    for batch in table.to_batches(_ROWS_AT_ONCE):
        columns = [[_bytes(cell.decode()) for cell in column.to_pylist()] for column in batch.columns]
        for cells in zip(*columns, strict=True):
            yield from skipped()
            values = {name: cells[place] for name, place in zip(wanted, places, strict=True)}
            yield f"{where}row {number}", Stored(of_cells(cells), values)
    yield from skipped()
