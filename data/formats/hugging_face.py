"""Folders that ``save_to_disk`` of Hugging Face's ``datasets`` wrote: Arrow files, read without that library.

So nothing is mapped into memory, cached or looked up, and no code or path that a folder names is followed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from data.formats.arrow_rows import Layout, Numbered, read_columns, rows_of
from data.formats.config import HuggingFaceConfig
from data.formats.files import folder_at
from data.formats.rows import Reading
from model.errors import BadInputError


def read_hugging_face(path: Path, config: HuggingFaceConfig) -> Reading:
    """Return the rows of a data set.

    Raises:
        BadInputError: the folder is no such data set or has no such split, a file cannot be read, or as
            :func:`read_columns` says.
    """
    folder = _folder_of_split(folder_at(path), config.split)
    files = _files(folder)
    with _opened(files[0]) as stream:
        layout = Layout.of(stream.schema)

    def rows(columns: tuple[str, ...]) -> Iterator[Numbered]:
        number = 0
        for file in files:
            with _opened(file) as stream:
                if not stream.schema.equals(layout.types):
                    raise BadInputError(f"{file}: has other columns than {files[0].name}, must have the same")
                for row in rows_of(stream, columns):
                    number += 1
                    yield f"row {number}", row

    return read_columns(folder, config, layout.names, layout.numbers, rows, layout.names)


def _folder_of_split(path: Path, split: str | None) -> Path:
    several = path / "dataset_dict.json"
    if not several.is_file():
        if split is not None:
            raise BadInputError(f"{path}: has no splits, split must not be given")
        return path
    splits = _read_json(several).get("splits")
    if split is None or not isinstance(splits, list) or split not in splits or not _is_plain(split):
        raise BadInputError(f"{path}: split must be one of those that dataset_dict.json names")
    return folder_at(path / split)


def _files(folder: Path) -> list[Path]:
    state = folder / "state.json"
    files = _read_json(state).get("_data_files")
    names = [file.get("filename") for file in files if isinstance(file, dict)] if isinstance(files, list) else []
    if not names or not all(isinstance(name, str) and _is_plain(name) for name in names):
        raise BadInputError(f"{state}: must name the data set's files, all in its own folder")
    return [folder / str(name) for name in names]


def _is_plain(name: str) -> bool:
    """Whether a name leads to no other folder than the one it is in."""
    return Path(name).name == name and name != ".."


def _read_json(file: Path) -> dict[str, object]:
    try:
        document = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BadInputError(f"{file}: cannot be read, must be what save_to_disk of datasets wrote") from error
    if not isinstance(document, dict):
        raise BadInputError(f"{file}: must be a JSON object, as save_to_disk of datasets writes it")
    return document


@contextmanager
def _opened(file: Path) -> Iterator[pa.RecordBatchStreamReader]:
    try:
        with file.open("rb") as content, pa.ipc.open_stream(content) as stream:
            yield stream
    except (pa.ArrowException, OSError, UnicodeError, MemoryError) as error:
        raise BadInputError(f"{file}: cannot be read, must be an undamaged Arrow stream") from error
