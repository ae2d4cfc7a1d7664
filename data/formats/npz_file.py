"""Arrays that numpy saved, ``.npz``. Nothing is unpickled: arrays of objects are refused."""

from __future__ import annotations

import io
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from conclave.base.errors import BadInputError
from conclave.data.formats.config import NpzConfig
from conclave.data.values.identity import of_content
from conclave.data.values.kinds import class_of, group_of, missing_numbers
from conclave.data.values.picture import picture_of_array
from conclave.data.values.rows import BadRow, BadValueError, Reading, Row, attempt
from conclave.data.values.schema import ImageSchema, Schema, TableSchema, TextSchema

MOST_BYTES = 1 << 34
"""What a file may unpack to. A file of some kilobytes could claim any size."""
_DAMAGED = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    OverflowError,
    MemoryError,
    RuntimeError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)  # what zipfile and numpy raise on damaged files


def read_npz(path: Path, config: NpzConfig) -> Reading:
    """Return the rows of the arrays of one file.

    A row is known by its bytes in the array of the records. Other arrays take no part, labels included: which of them
    belong to records would have to be derived from how many records there are.

    Raises:
        BadInputError: the file cannot be read; an array is missing, holds objects, or has another shape or type.
    """
    wanted = [name for name in (config.image, config.table, config.text) if name is not None]
    extra = [name for name in (config.label, config.group_by) if name is not None]
    arrays = _load(path, [*wanted, *extra])
    values, count = arrays[wanted[0]], len(arrays[wanted[0]])
    for name in extra:
        if arrays[name].shape != (count,):
            raise BadInputError(f"{path}: {name!r} has the shape {list(arrays[name].shape)}, must be [{count}]")
    schema, record = _records(path, config, wanted[0], values)
    stored_as = (wanted[0], values.dtype.str, *map(str, values.shape[1:]))
    return Reading(schema, _rows(config, values, record, arrays), stored_as)


def array_from(content: bytes) -> np.ndarray:
    """Return the array that a ``.npy`` file holds.

    Raises:
        BadValueError: it is damaged, or not an array of numbers.
    """
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except _DAMAGED:
        array = None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise BadValueError("must be an undamaged .npy array of numbers")
    return array


def _load(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as opened:
            if not isinstance(opened, np.lib.npyio.NpzFile):
                raise ValueError("not an archive")
            archive = opened.zip
            if archive is None or sum(item.file_size for item in archive.infolist()) > MOST_BYTES:
                raise BadInputError(f"{path}: unpacks to more than {MOST_BYTES} bytes, must be at most that")
            missing = [name for name in names if name not in opened.files]
            if missing:
                raise BadInputError(f"{path}: has no array {missing[0]!r}, must have it")
            arrays = {name: opened[name] for name in names}
    except BadInputError:
        raise
    except _DAMAGED as error:
        raise BadInputError(f"{path}: cannot be read, must be an undamaged .npz file without Python objects") from error
    for name, array in arrays.items():
        if array.dtype.kind not in "biufUSM" or array.ndim == 0:
            raise BadInputError(f"{path}: {name!r} holds {array.dtype}, must be an array of numbers or strings")
    return arrays


def _records(
    path: Path, config: NpzConfig, name: str, values: np.ndarray
) -> tuple[Schema, Callable[[np.ndarray], np.ndarray]]:
    shape = values.shape[1:]
    if config.text is not None:
        if len(shape) != 1 or shape[0] < 2 or values.dtype != np.uint8:
            raise BadInputError(f"{path}: {name!r} is {values.dtype} {list(shape)} a record, must be uint8 [window]")
        return TextSchema(window=shape[0]), lambda row: row
    classes = config.labelled.class_count
    if config.table is not None:
        return _table(path, config, name, values, classes)
    if len(shape) != len(config.axes) or 0 in shape or not (values.dtype == np.uint8 or values.dtype.kind == "f"):
        raise BadInputError(
            f"{path}: {name!r} is {values.dtype} {list(shape)} a record, must be uint8 or float {config.axes}"
        )
    in_order = dict(zip(config.axes, shape, strict=True))
    image = (in_order.get("C", 1), in_order["H"], in_order["W"])
    return ImageSchema(image=image, classes=classes), lambda row: _picture(row, config).reshape(image)


def _picture(row: np.ndarray, config: NpzConfig) -> np.ndarray:
    picture = picture_of_array(row)
    return picture.transpose(2, 0, 1) if config.axes == "HWC" else picture


def _table(
    path: Path, config: NpzConfig, name: str, values: np.ndarray, classes: int
) -> tuple[Schema, Callable[[np.ndarray], np.ndarray]]:
    shape = values.shape[1:]
    if len(shape) != 1 or shape[0] < 1 or values.dtype.kind not in "biuf":
        raise BadInputError(f"{path}: {name!r} is {values.dtype} {list(shape)} a record, must be numbers [features]")
    for key in ("center", "scale"):
        given = getattr(config, key)
        if isinstance(given, tuple) and len(given) != shape[0]:
            raise BadInputError(f"{path}: {key} has {len(given)} constants, must have one or {shape[0]}")
    center, scale = np.asarray(config.center, np.float64), np.asarray(config.scale, np.float64)
    stand_for_none = sorted(missing_numbers(config.missing_values))

    def record(row: np.ndarray) -> np.ndarray:
        missing = np.isnan(row) if row.dtype.kind == "f" else np.zeros(shape, dtype=bool)
        with np.errstate(over="ignore"):  # of a number that the row's type has not
            for number in stand_for_none:
                missing |= row == number  # compared in the row's own precision
        if config.missing is None and missing.any():
            raise BadValueError("a value is missing, must be given where missing is not set")
        with np.errstate(over="ignore", invalid="ignore"):
            standard = ((row.astype(np.float64) - center) / scale).astype(np.float32)
        found = np.where(missing, np.float32(config.missing or 0.0), standard)
        if not np.isfinite(found).all():
            raise BadValueError("a value must be a finite number, within what float32 holds")
        return found

    return TableSchema(features=shape[0], classes=classes), record


def _rows(
    config: NpzConfig,
    values: np.ndarray,
    record: Callable[[np.ndarray], np.ndarray],
    arrays: dict[str, np.ndarray],
) -> Iterator[Row | BadRow]:
    known = {} if config.label is None else config.labelled.known()
    spelled_missing = frozenset(config.missing_values)

    def make(number: int) -> Row:
        label = None if config.label is None else class_of(arrays[config.label][number], known)
        group = None if config.group_by is None else group_of(arrays[config.group_by][number], spelled_missing)
        return Row(record(values[number])[np.newaxis], of_content(values[number].tobytes()), label, group)

    for number in range(len(values)):
        yield attempt(f"row {number + 1}", lambda number=number: make(number))  # type: ignore[misc]  # bound at once
