"""Private data from the files that their owner has.

Privacy: whether a row can be used depends on that row alone, so no unit decides about another's. Which could not, and
how many, derives from private data: it goes to the node's own log and nowhere else, and no message repeats a row's
content. It only reads: no copy, no cache, no connection.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from conclave.base.errors import BadInputError
from conclave.data.formats.config import FormatConfig
from conclave.data.formats.csv_files import read_csv
from conclave.data.formats.hugging_face import read_hugging_face
from conclave.data.formats.idx_files import read_idx_pair
from conclave.data.formats.image_folder import read_image_folder
from conclave.data.formats.npz_file import read_npz
from conclave.data.formats.parquet_files import read_parquet
from conclave.data.formats.text_folder import read_text_folder
from conclave.data.formats.wav_folder import read_wav_folder
from conclave.data.sources import GROUP
from conclave.data.values.identity import SCHEME, SIZE
from conclave.data.values.kinds import group_number
from conclave.data.values.names import NAMING
from conclave.data.values.rows import BadRow, Reading, Row
from conclave.data.values.schema import ImageSchema, Schema, TableSchema
from conclave.model.records import Records

log = logging.getLogger("conclave.node")

MOST_NAMED = 1000
"""So many bad rows are named in the log; all are counted."""

_READERS: dict[str, Callable[[Path, Any], Reading]] = {
    "csv": read_csv,
    "parquet": read_parquet,
    "hugging-face": read_hugging_face,
    "npz": read_npz,
    "idx": read_idx_pair,
    "image-folder": read_image_folder,
    "wav-folder": read_wav_folder,
    "text-folder": read_text_folder,
}


@dataclass(frozen=True)
class PrivateData:
    """A node's data: the records by name, what they look like, what they are known by, and the rows left out.

    records: ``image`` float32 [N, C, H, W] in [0, 1], ``table`` float32 [N, features] or ``text`` uint8 [N, window];
        ``label`` int64 [N] but for text; ``group`` int64 [N] where records are grouped.
    bad: for the owner's eyes only.
    identity_N: uint8 [N, 32], what each record is known by, however it is read; see
        :mod:`conclave.data.values.identity`. It must not leave the node, and is neither logged nor stored.
    stored_as: what identities of units, records or groups, depend on besides what is stored of each. Public.
    """

    records: Records
    schema: Schema
    bad: tuple[BadRow, ...]
    identity_N: np.ndarray = field(repr=False)
    stored_as: tuple[str, ...]


def read_private(path: Path, config: FormatConfig, unit: Literal["record", "group"]) -> PrivateData:
    """Read private data.

    Rows that cannot be used are left out, counted, and named in the log ``conclave.node``. A group's number is the
    hash of its name: it stays the same whoever else joins or leaves.

    Args:
        path: a file or a folder, as the format says.
        unit: whose participation is protected. A ``group`` needs a format that says which group a record is of.

    Raises:
        BadInputError: the data cannot be read, no row of them can be used, or there are no groups where they are the
            unit.
    """
    if unit == "group" and not _grouped(config):
        raise BadInputError(f"{path}: unit is group, so format.group_by must be given")
    try:
        reading = _READERS[config.kind](path, config)
        rows, bad = _sort(reading)
    except OSError as error:
        raise BadInputError(f"{path}: cannot be read, must be data of format {config.kind}") from error
    _report(path, len(rows), bad)
    if not rows:
        raise BadInputError(
            f"{path}: none of its rows can be used, must have one; the node's log says why"
            if bad
            else f"{path}: has no rows, must have one that can be used"
        )
    _report_groups_alike(path, rows)
    return PrivateData(
        records=_records(reading.schema, rows),
        schema=reading.schema,
        bad=tuple(bad),
        identity_N=_identities(rows),
        stored_as=(SCHEME, config.kind, unit, *(_groups_named_by(config) if unit == "group" else reading.stored_as)),
    )


def _grouped(config: FormatConfig) -> bool:
    by_file = getattr(config, "grouped", None)
    return bool(by_file) if by_file is not None else getattr(config, "group_by", None) is not None


def _groups_named_by(config: FormatConfig) -> tuple[str, ...]:
    """Return the parts of a format that say how groups are named."""
    keys = {"group_by", "pattern", "columns", "delimiter"}
    return (NAMING, json.dumps(config.model_dump(mode="json", include=keys), sort_keys=True))


def _sort(reading: Reading) -> tuple[list[Row], list[BadRow]]:
    rows: list[Row] = []
    bad: list[BadRow] = []
    for row in reading.rows:
        if isinstance(row, BadRow):
            bad.append(row)
        else:
            rows.append(row)
    return rows, bad


def _report_groups_alike(path: Path, rows: list[Row]) -> None:
    """Tell the owner about groups like 007 and 7: a program that took one for a number may have written the other."""
    names = {row.group for row in rows if row.group is not None}
    padded = [name for name in names if name.startswith("0") and len(name) > 1 and name.isdecimal()]
    alike = sum((name.lstrip("0") or "0") in names for name in padded)
    if alike:
        log.warning(
            "%s: %d groups have another's name but for zeros before it, as 007 and 7; where they are one person's, "
            "write them alike: each is a unit of its own",
            path,
            alike,
        )


def _report(path: Path, usable: int, bad: list[BadRow]) -> None:
    if not bad:
        return
    log.warning("%s: %d of %d rows cannot be used and are left out", path, len(bad), usable + len(bad))
    for row in bad[:MOST_NAMED]:
        log.warning("%s: %s: %s", path, _on_one_line(row.where), row.why)
    if len(bad) > MOST_NAMED:
        log.warning("%s: %d more are not named", path, len(bad) - MOST_NAMED)


def _on_one_line(name: str) -> str:
    """File names may have line breaks, which must not look like other lines of the log."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)


def _records(schema: Schema, rows: list[Row]) -> dict[str, Tensor]:
    modality = "image" if isinstance(schema, ImageSchema) else "table" if isinstance(schema, TableSchema) else "text"
    records = {modality: torch.from_numpy(np.concatenate([row.records for row in rows]))}
    if rows[0].label is not None:
        records["label"] = torch.tensor([row.label for row in rows], dtype=torch.int64)
    if rows[0].group is not None:
        numbers = [group_number(row.group or "") for row in rows]
        each = torch.tensor([len(row.records) for row in rows])
        records[GROUP] = torch.tensor(numbers, dtype=torch.int64).repeat_interleave(each)
    return records


def _identities(rows: list[Row]) -> np.ndarray:
    together = b"".join([row.identity * len(row.records) for row in rows])
    return np.frombuffer(together, dtype=np.uint8).reshape(-1, SIZE)
