"""Parquet files, read by pyarrow."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from conclave.base.errors import BadInputError
from conclave.data.formats.arrow_rows import Numbered, read_columns, rows_of
from conclave.data.formats.config import ParquetConfig
from conclave.data.formats.files import files_in
from conclave.data.formats.layout import layout_of
from conclave.data.values.rows import Reading

_ROWS_AT_ONCE = 4096
_TABLE_FORMATS = {"_delta_log": "Delta", "metadata/*.metadata.json": "Iceberg", ".hoodie": "Hudi"}
"""What lies beside the files of a table whose rows, by a log of its own, do not all count any more."""


def read_parquet(path: Path, config: ParquetConfig) -> Reading:
    """Return the rows of a Parquet file, or of all in a folder.

    Raises:
        BadInputError: a file cannot be read, files have different columns, the folder is a table with a log of its own,
            or as :func:`read_columns` says.
    """
    for mark, kind in _TABLE_FORMATS.items():
        if next(path.rglob(mark), None) is not None or next(path.parent.glob(mark), None) is not None:
            raise BadInputError(
                f"{path}: is a {kind} table, whose log says which rows were deleted; must be plain Parquet files: "
                "export the rows that count"
            )
    files = files_in(path, (".parquet",))
    types = {file: _types(file) for file in files}
    layout = layout_of(types)

    def rows(columns: tuple[str, ...]) -> Iterator[Numbered]:
        for file in files:
            where = f"{file.relative_to(path)}, " if file != path else ""
            with _opened(file) as opened:
                batches = opened.iter_batches(_ROWS_AT_ONCE, use_threads=False)
                for number, row in enumerate(rows_of(batches, columns), start=1):
                    yield f"{where}row {number}", row

    return read_columns(path, config, layout.names, layout.numbers, rows, layout.stored)


def _types(file: Path) -> pa.Schema:
    with _opened(file) as opened:
        types = opened.schema_arrow
        types.names  # noqa: B018  # decoded here, where a damaged name is an error of this file
        return types


@contextmanager
def _opened(file: Path) -> Iterator[parquet.ParquetFile]:
    """Open a file with pyarrow's own reader and without reading ahead.

    pyarrow's threads read ahead. They may release a Python file at any time; if the
    interpreter ends before that, they abort the process.
    """
    try:
        with pa.OSFile(os.fsencode(file)) as content, parquet.ParquetFile(content, pre_buffer=False) as opened:
            yield opened
    except (pa.ArrowException, OSError, UnicodeError, MemoryError) as error:
        raise BadInputError(f"{file}: cannot be read, must be an undamaged Parquet file") from error
