"""WAV files put together chunk by chunk, as RIFF (1991), the WAVEFORMATEXTENSIBLE header and EBU Tech 3306 say."""

from __future__ import annotations

import struct

GUID = bytes.fromhex("000000001000800000aa00389b71")


def chunk(name: bytes, content: bytes, *, size: int | None = None, pad: bool = True) -> bytes:
    """A chunk; ``size`` is announced in place of the true one, ``pad`` is the zero byte after an odd number."""
    after = b"\0" if pad and len(content) % 2 else b""
    return name + struct.pack("<I", len(content) if size is None else size) + content + after


def fmt(tag: int = 1, *, bits: int = 16, channels: int = 1, rate: int = 8000) -> bytes:
    """The header of 16 bytes."""
    return chunk(b"fmt ", _form(tag, bits, channels, rate))


def extensible_fmt(
    encoding: int = 1, *, bits: int = 16, channels: int = 1, valid: int = 0, tail: bytes = GUID
) -> bytes:
    """The longer header, where the encoding is a GUID."""
    more = struct.pack("<HHIH", 22, valid or bits, 0, encoding)
    return chunk(b"fmt ", _form(0xFFFE, bits, channels, 8000) + more + tail)


def _form(tag: int, bits: int, channels: int, rate: int) -> bytes:
    block = channels * (bits // 8)
    return struct.pack("<HHIIHH", tag, channels, rate, rate * block, block, bits)


def riff(*chunks: bytes, name: bytes = b"RIFF", size: int | None = None) -> bytes:
    """A file."""
    body = b"WAVE" + b"".join(chunks)
    return name + struct.pack("<I", len(body) if size is None else size) + body


def ds64(data: int, *others: tuple[bytes, int]) -> bytes:
    """The lengths of 64 bits: of the samples, and of other chunks by name."""
    table = b"".join(name + struct.pack("<Q", size) for name, size in others)
    return chunk(b"ds64", struct.pack("<QQQI", 0, data, 0, len(others)) + table)
