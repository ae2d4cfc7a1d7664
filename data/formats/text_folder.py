"""A folder of text files."""

from __future__ import annotations

import codecs
from pathlib import Path

import numpy as np

from data.formats.config import TextFolderConfig
from data.formats.folders import folder_rows
from data.formats.rows import BadValueError, Reading
from data.formats.text import windows
from data.schema import TextSchema


def read_text_folder(path: Path, config: TextFolderConfig) -> Reading:
    """Return the windows of all files of a folder and its sub-folders.

    A byte order mark of UTF-8 is no text and is left out; a file of UTF-16 or UTF-32 is a bad row.

    Raises:
        BadInputError: there is no such folder, or no text in it.
    """

    def records(content: bytes) -> np.ndarray:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
            raise BadValueError("must be text in UTF-8, not UTF-16 or UTF-32: save it as that")
        return windows(content.removeprefix(codecs.BOM_UTF8), config.window)

    return Reading(TextSchema(window=config.window), folder_rows(path, config, (".txt",), None, records))
