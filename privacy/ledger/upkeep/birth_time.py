"""When a file was created: together with its number this distinguishes it from a later file with the same number.

Modification times do not: a file that is edited, or given another time, is still the same file.
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
    """Return the time in nanoseconds; None if the operating or file system does not say. Links are followed."""
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
    """Return the C library's function, which Python does not offer; None if there is none."""
    try:
        call = ctypes.CDLL(None, use_errno=True).statx
    except (OSError, AttributeError):
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p]
    return call
