"""A folder of pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from conclave.data.formats.config import ImageFolderConfig
from conclave.data.formats.folders import folder_rows
from conclave.data.values.picture import picture_from
from conclave.data.values.rows import Reading
from conclave.data.values.schema import ImageSchema


def read_image_folder(path: Path, config: ImageFolderConfig) -> Reading:
    """Return the pictures of a folder and its sub-folders.

    Raises:
        BadInputError: there is no such folder, or no picture in it.
    """

    def records(content: bytes) -> np.ndarray:
        return picture_from(content, config)[np.newaxis]

    schema = ImageSchema(image=(config.channels, config.height, config.width), classes=config.class_count)
    return Reading(schema, folder_rows(path, config, (".png", ".jpg", ".jpeg", ".bmp"), config.known(), records))
