"""Folders with one file per record: what a file's name and place say about it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np

from conclave.data.formats.config import FolderConfig
from conclave.data.formats.files import files_in, folder_at
from conclave.data.values.identity import of_content
from conclave.data.values.kinds import class_of, group_of
from conclave.data.values.rows import BadRow, BadValueError, Row, attempt

MOST_BYTES = 1 << 32
"""What a file may have: it is read into memory as a whole, since its identity is that of all its bytes."""


class _Place(NamedTuple):
    label: str | None
    group: str | None


def folder_rows(
    path: Path,
    config: FolderConfig,
    suffixes: tuple[str, ...],
    known: Mapping[str, int] | None,
    records: Callable[[bytes], np.ndarray],
) -> Iterator[Row | BadRow]:
    """Yield a row for each file of a folder and its sub-folders.

    A file is known by its bytes alone, and each of its records by the file: renaming it, or moving it to another
    label's folder, does not make it another record.

    Args:
        suffixes: of the files that count, in lower case; others are left alone.
        known: the class of every label; None where there are none.
        records: makes records [records, …] of a file's content; raises :class:`BadValueError`.

    Raises:
        BadInputError: there is no such folder, or no such file in it.
    """
    files = files_in(folder_at(path), suffixes)

    def make(file: Path) -> Row:
        place = _place(file.relative_to(path), config, labelled=known is not None)
        label = None if known is None else class_of(place.label, known)
        group = None if place.group is None else group_of(place.group)
        try:
            with file.open("rb") as stream:
                content = stream.read(MOST_BYTES + 1)
        except OSError:
            raise BadValueError("must be a file that can be read") from None
        if len(content) > MOST_BYTES:
            raise BadValueError(f"must have at most {MOST_BYTES} bytes")
        return Row(records(content), of_content(content), label, group)

    return (attempt(str(file.relative_to(path)), lambda file=file: make(file)) for file in files)  # type: ignore[misc]


def _place(file: PurePath, config: FolderConfig, *, labelled: bool) -> _Place:
    match = None
    if config.pattern is not None:
        match = re.fullmatch(config.pattern, file.stem)
        if match is None:
            raise BadValueError("must have a name that pattern fits")
    folders = file.parts[:-1]
    if config.names("label"):
        label = match["label"] if match else None
    elif labelled:
        if not folders:
            raise BadValueError("must lie in a sub-folder that is named like its label")
        label, folders = folders[0], folders[1:]
    else:
        label = None
    if config.names("group"):
        return _Place(label, (match["group"] if match else None) or "")
    if config.group_by == "folder" and not folders:
        raise BadValueError("must lie in a folder of its group")
    by = {"folder": folders[0] if folders else None, "file": file.as_posix(), None: None}
    return _Place(label, by[config.group_by])
