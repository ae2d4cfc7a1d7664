"""Parquet files, read by pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from data.formats.arrow_rows import Layout, Numbered, read_columns, rows_of
from data.formats.config import ParquetConfig
from data.formats.files import files_in
from data.formats.rows import Reading
from model.errors import BadInputError

_ROWS_AT_ONCE = 4096


def read_parquet(path: Path, config: ParquetConfig) -> Reading:
    """Return the rows of a Parquet file, or of all in a folder.

    Raises:
        BadInputError: a file cannot be read, files have different columns, or as :func:`read_columns` says.
    """
    files = files_in(path, (".parquet",))
    layouts = {file: _layout(file) for file in files}
    layout = layouts[files[0]]
    for file, other in layouts.items():
        if not other.types.equals(layout.types):
            raise BadInputError(f"{file}: has other columns than {files[0].name}, must have the same in the same order")

    def rows(columns: tuple[str, ...]) -> Iterator[Numbered]:
        for file in files:
            where = f"{file.relative_to(path)}, " if file != path else ""
            with _opened(file) as opened:
                batches = opened.iter_batches(_ROWS_AT_ONCE, use_threads=False)
                for number, row in enumerate(rows_of(batches, columns), start=1):
                    yield f"{where}row {number}", row

    return read_columns(path, config, layout.names, layout.numbers, rows, layout.names)


def _layout(file: Path) -> Layout:
    with _opened(file) as opened:
        return Layout.of(opened.schema_arrow)


@contextmanager
def _opened(file: Path) -> Iterator[parquet.ParquetFile]:
    try:
        with file.open("rb") as content:
            yield parquet.ParquetFile(content)
    except (pa.ArrowException, OSError, UnicodeError, MemoryError) as error:
        raise BadInputError(f"{file}: cannot be read, must be an undamaged Parquet file") from error
