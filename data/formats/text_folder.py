"""A folder of text files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.formats.config import TextFolderConfig
from data.formats.folders import folder_rows
from data.formats.rows import Reading
from data.formats.text import windows
from data.schema import TextSchema


def read_text_folder(path: Path, config: TextFolderConfig) -> Reading:
    """Return the windows of all files of a folder and its sub-folders.

    Raises:
        BadInputError: there is no such folder, or no text in it.
    """

    def records(content: bytes) -> np.ndarray:
        return windows(content, config.window)

    return Reading(TextSchema(window=config.window), folder_rows(path, config, (".txt",), None, records))
