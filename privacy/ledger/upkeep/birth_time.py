"""When a file came into being: with its number it tells a file from a later one that was given the same number.

Times of change do not: who edits a file, or copies another time onto it, still has the same file.
"""

from __future__ import annotations

import ctypes
import os
import struct
from functools import cache
from pathlib import Path
from typing import Any

_HERE = -100  # AT_FDCWD
_BORN = 0x800  # STATX_BTIME
_SIZE, _AT = 256, 80  # of struct statx (statx(2)), and where stx_btime begins in it


def birth_time(path: Path) -> str | None:
    """Return the time in nanoseconds; None where the operating or the file system does not say. Links are followed."""
    call = _statx()
    if call is None:
        return None
    answer = ctypes.create_string_buffer(_SIZE)
    if call(_HERE, os.fsencode(path), 0, _BORN, answer) != 0:
        return None
    (known,) = struct.unpack_from("=I", answer, 0)
    seconds, nanoseconds = struct.unpack_from("=qI", answer, _AT)
    return str(seconds * 10**9 + nanoseconds) if known & _BORN else None


@cache
def _statx() -> Any:
    """Return the C library's function, which Python has no name for; None where there is none."""
    try:
        call = ctypes.CDLL(None, use_errno=True).statx
    except (OSError, AttributeError):
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p]
    return call
