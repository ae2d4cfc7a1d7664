"""The IDX file format of the original MNIST files, plain or gz. A file may be damaged or malicious.

A header of two zero bytes, a type (8: unsigned byte) and the number of axes; each axis' length as a big-endian 32-bit
integer; then the values.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from conclave.base.errors import BadInputError

_UNSIGNED_BYTE = 8
_GZ = b"\x1f\x8b"
MOST_VALUES = 1 << 28
"""What a file may hold: five times MNIST. A gz file of some kilobytes could claim, and unpack to, any size."""


def read_idx(path: Path, item: tuple[int, ...]) -> np.ndarray:
    """Read a file of unsigned bytes.

    Args:
        path: compressed where its name ends in ``.gz`` or its content begins as gz does; some programs drop the ending.
        item: the lengths of all axes but the first.

    Returns:
        uint8 [items, *item], items ≥ 1.

    Raises:
        BadInputError: the file cannot be read, is not such a file, or holds fewer or more values than it says.
    """
    try:
        with path.open("rb") as plain:
            compressed = path.suffix.lower() == ".gz" or plain.peek(2)[:2] == _GZ
            if not compressed:
                return _read(plain, path, item)
            with gzip.open(plain) as file:
                return _read(file, path, item)
    except (OSError, EOFError, zlib.error) as error:  # damaged gz raises any of them
        raise BadInputError(f"{path}: cannot be read, must be an undamaged IDX file") from error


def _read(file: BinaryIO | gzip.GzipFile, path: Path, item: tuple[int, ...]) -> np.ndarray:
    axes = 1 + len(item)
    header = file.read(4 + 4 * axes)
    if len(header) < 4 + 4 * axes or header[:4] != bytes([0, 0, _UNSIGNED_BYTE, axes]):
        raise BadInputError(f"{path}: begins with {header[:4].hex()}, must be IDX, 0000{_UNSIGNED_BYTE:02x}{axes:02x}")
    shape = tuple(int(length) for length in np.frombuffer(header, dtype=">u4", offset=4))
    if shape[1:] != item or shape[0] == 0:
        raise BadInputError(f"{path}: holds {list(shape)} values, must be {['one or more', *item]}".replace("'", ""))
    count = math.prod(shape)
    if count > MOST_VALUES:
        raise BadInputError(f"{path}: holds {count} values, must be at most {MOST_VALUES}")
    values = file.read(count + 1)  # one more: the end is then seen, and with it a gz file's checksum
    if len(values) != count:
        found = f"{len(values)}" if len(values) < count else "more"
        raise BadInputError(f"{path}: holds {found} values after its header, must be the {count} it announces")
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)
