"""A pair of IDX files: images and their labels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from conclave.base.errors import BadInputError
from conclave.data.formats.config import IdxConfig
from conclave.data.formats.files import folder_at
from conclave.data.formats.idx import read_idx
from conclave.data.values.identity import of_content
from conclave.data.values.kinds import class_of
from conclave.data.values.rows import BadRow, Reading, Row, attempt
from conclave.data.values.schema import ImageSchema


def read_idx_pair(path: Path, config: IdxConfig) -> Reading:
    """Return the images of a folder. An image is known by its bytes, whatever its label in the other file.

    Raises:
        BadInputError: a file is missing, damaged or of another shape; see :mod:`conclave.data.formats.idx`.
    """
    images = read_idx(_file(path, config.image_file), (config.height, config.width))
    labels = read_idx(_file(path, config.label_file), ())
    if len(labels) != len(images):
        raise BadInputError(f"{path}: has {len(labels)} labels, must have one for each of the {len(images)} images")
    schema = ImageSchema(image=(1, config.height, config.width), classes=config.class_count)
    return Reading(schema, _rows(images, labels, config))


def _file(path: Path, name: str) -> Path:
    folder = folder_at(path)
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            return file
    raise BadInputError(f"{folder}: has no {name}, must have it, plain or .gz")


def _rows(images: np.ndarray, labels: np.ndarray, config: IdxConfig) -> Iterator[Row | BadRow]:
    known = config.known()

    def make(number: int) -> Row:
        image, label = images[number], class_of(labels[number], known)
        return Row(image[np.newaxis, np.newaxis].astype(np.float32) / 255.0, of_content(image.tobytes()), label)

    for number in range(len(images)):
        yield attempt(f"row {number + 1}", lambda number=number: make(number))  # type: ignore[misc]  # bound at once
