"""Folders that ``save_to_disk`` of Hugging Face's ``datasets`` wrote: Arrow files, read without that library.

So nothing is mapped into memory, cached or looked up, and no code or path that a folder names is followed. What a
folder says about its rows is honoured, in every version's spelling: rows that were left out are not read. A folder that
says something else is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa

from conclave.base.errors import BadInputError
from conclave.data.formats.arrow_rows import Numbered, Stored, read_columns, rows_of
from conclave.data.formats.config import HuggingFaceConfig
from conclave.data.formats.files import folder_at
from conclave.data.formats.layout import layout_of
from conclave.data.values.names import column_name
from conclave.data.values.rows import Reading

_UNIMPORTANT = ("_fingerprint", "_format_kwargs", "_format_type", "_output_all_columns", "_split")
"""What a folder says that changes no row: which split it was, how ``datasets`` would hand rows over."""
_INDICES = ("_indices_data_files", "_indices_files")


@dataclass(frozen=True)
class _Part:
    """An Arrow file of which ``take`` rows after the first ``skip`` count; None means all."""

    file: Path
    skip: int
    take: int | None


@dataclass(frozen=True)
class _State:
    """What a folder states. shown: the columns that its owner chose to see; None for all."""

    parts: tuple[_Part, ...]
    indices: tuple[_Part, ...]
    shown: frozenset[str] | None


def read_hugging_face(path: Path, config: HuggingFaceConfig) -> Reading:
    """Return the rows of a data set.

    Raises:
        BadInputError: the folder is not such a data set or has no such split, says something unknown of its rows, a
            file cannot be read, or as :func:`read_columns` says.
    """
    folder = _folder_of_split(folder_at(path), config.split)
    state = _state(folder)
    layout = layout_of({part.file: _types(part.file) for part in state.parts})
    numbers = layout.numbers if state.shown is None else layout.numbers & state.shown

    def rows(columns: tuple[str, ...]) -> Iterator[Numbered]:
        found = _rows(state.parts, columns)
        if state.indices:
            found = _selected(list(found), state.indices)
        for number, row in enumerate(found, start=1):
            yield f"row {number}", row

    return read_columns(folder, config, layout.names, numbers, rows, layout.stored)


def _rows(parts: Iterable[_Part], columns: tuple[str, ...]) -> Iterator[Stored]:
    for part in parts:
        with _opened(part.file) as stream:
            found = rows_of(stream, columns)
            yield from islice(found, part.skip, None if part.take is None else part.skip + part.take)


def _selected(rows: list[Stored], indices: Iterable[_Part]) -> Iterator[Stored]:
    """Yield the rows that a folder's indices name, in that order."""
    for part in indices:
        with _opened(part.file) as stream:
            if len(stream.schema) != 1 or not pa.types.is_integer(stream.schema.types[0]):
                raise BadInputError(f"{part.file}: must have one column of whole numbers, the rows that count")
            for index in islice(
                (index for batch in stream for index in batch.column(0).to_pylist()),
                part.skip,
                None if part.take is None else part.skip + part.take,
            ):
                if index is None or not 0 <= index < len(rows):
                    raise BadInputError(f"{part.file}: names a row that there is not, must name rows of the data set")
                yield rows[index]


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


def _state(folder: Path) -> _State:
    path = folder / "state.json"
    document = _read_json(path)
    parts = _parts(path, document.pop("_data_files", None))
    if not parts:
        raise BadInputError(f"{path}: must name the data set's files, all in its own folder")
    indices = [part for key in _INDICES for part in _parts(path, document.pop(key, None))]
    shown, every = document.pop("_format_columns", None), document.get("_output_all_columns")
    if shown is not None and not (isinstance(shown, list) and all(isinstance(name, str) for name in shown)):
        raise BadInputError(f"{path}: _format_columns must be a list of columns, or null")
    for key, value in document.items():
        if key not in _UNIMPORTANT and _says_something(value):
            raise BadInputError(
                f"{path}: {key} says of the data set what this program does not know, must not be there: load and save "
                "it with a current version of datasets"
            )
    columns = None if shown is None or every else frozenset(column_name(str(name)) for name in shown)
    return _State(parts, tuple(indices), columns)


def _parts(state: Path, files: object) -> tuple[_Part, ...]:
    if files is None:
        return ()
    if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
        raise BadInputError(f"{state}: must name the data set's files, all in its own folder")
    return tuple(_part(state, file) for file in files)


def _part(state: Path, file: Mapping[str, object]) -> _Part:
    name, skip, take = file.get("filename"), file.get("skip", 0), file.get("take")
    if not isinstance(name, str) or not _is_plain(name):
        raise BadInputError(f"{state}: must name the data set's files, all in its own folder")
    skip = 0 if skip is None else skip
    if not (_counts(skip) and (take is None or _counts(take))):
        raise BadInputError(f"{state}: skip and take of {name} must be numbers of rows")
    for key, value in file.items():
        if key not in ("filename", "skip", "take") and _says_something(value):
            raise BadInputError(f"{state}: {key} of {name} is not known to this program, must not be there")
    return _Part(state.parent / name, int(str(skip)), None if take is None else int(str(take)))


def _counts(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _says_something(value: object) -> bool:
    """Whether anything but empty lists and the like is said: old versions write an empty history of changes."""
    if isinstance(value, Mapping):
        return any(map(_says_something, value.values()))
    if isinstance(value, list):
        return any(map(_says_something, value))
    return bool(value)


def _is_plain(name: str) -> bool:
    """Whether a name stays within the folder that it is in."""
    return Path(name).name == name and name != ".."


def _read_json(file: Path) -> dict[str, object]:
    try:
        document = json.loads(file.read_bytes(), object_pairs_hook=_each_once)
    except (OSError, ValueError, RecursionError) as error:
        raise BadInputError(f"{file}: cannot be read, must be what save_to_disk of datasets wrote") from error
    if not isinstance(document, dict):
        raise BadInputError(f"{file}: must be a JSON object, as save_to_disk of datasets writes it")
    return document


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return a JSON object, refusing a key that appears twice: one of the two would be ignored."""
    document = dict(pairs)
    if len(document) < len(pairs):
        raise ValueError("one key twice")
    return document


def _types(file: Path) -> pa.Schema:
    with _opened(file) as stream:
        types = stream.schema
        types.names  # noqa: B018  # decoded here, where a damaged name is an error of this file
        return types


@contextmanager
def _opened(file: Path) -> Iterator[pa.RecordBatchStreamReader]:
    """Open a file by pyarrow's own means and without threads; see :mod:`conclave.data.formats.parquet_files`."""
    alone = pa.ipc.IpcReadOptions(use_threads=False)
    try:
        with pa.OSFile(os.fsencode(file)) as content, pa.ipc.open_stream(content, options=alone) as stream:
            yield stream
    except (pa.ArrowException, OSError, UnicodeError, MemoryError) as error:
        raise BadInputError(f"{file}: cannot be read, must be an undamaged Arrow stream") from error
