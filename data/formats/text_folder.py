"""A folder of text files."""

from __future__ import annotations

import codecs
from pathlib import Path

import numpy as np

from conclave.data.formats.config import TextFolderConfig
from conclave.data.formats.folders import folder_rows
from conclave.data.values.rows import BadValueError, Reading
from conclave.data.values.schema import TextSchema
from conclave.data.values.text import windows


def read_text_folder(path: Path, config: TextFolderConfig) -> Reading:
    """Return the windows of all files of a folder and its sub-folders.

    A byte order mark of UTF-8 is not text and is left out; a file of UTF-16 or UTF-32 is a bad row.

    Raises:
        BadInputError: there is no such folder, or no text in it.
    """

    def records(content: bytes) -> np.ndarray:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
            raise BadValueError("must be text in UTF-8, not UTF-16 or UTF-32: save it as that")
        return windows(content.removeprefix(codecs.BOM_UTF8), config.window)

    return Reading(TextSchema(window=config.window), folder_rows(path, config, (".txt",), None, records))
