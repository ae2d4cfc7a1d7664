"""WAV files as recorders, editors and streams write them: where their samples are, and how they are stored.

A file is chunks: four letters, a length of 32 bits, that many bytes, and a zero byte after an odd number. ``RF64`` and
``BW64`` files (EBU Tech 3306, ITU-R BS.2088) have lengths of 64 bits in a chunk ``ds64``. A file may be damaged or made
to harm.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from conclave.data.values.rows import BadValueError

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_GUID = bytes.fromhex("000000001000800000aa00389b71")  # after the encoding's two bytes, in the longer header
_NAMED = {2: "ADPCM", 6: "A-law", 7: "mu-law", 0x11: "ADPCM", 0x31: "GSM 06.10", 0x50: "MPEG", 0x55: "MP3"}
_WIDTHS = {_PCM: (1, 2, 3, 4), _FLOAT: (4, 8)}
_UNKNOWN = 0x7FFF_0000
"""From this length on, what is more than the file has is a stream's, whose writer did not know it."""
_MOST_CHUNKS = 1000
_IN_DS64 = 0xFFFF_FFFF
_DAMAGED = "must be an undamaged WAV file of PCM samples or floats"


@dataclass(frozen=True)
class Wav:
    """Where a file's samples are. rate: frames a second. frames: as announced, or, in a stream, as there are.

    encoding: ``pcm`` or ``float``. width: bytes of a sample.
    """

    encoding: str
    rate: int
    channels: int
    width: int
    start: int
    frames: int

    def samples(self, content: bytes, frames: int) -> np.ndarray:
        """Return the first frames as float64 [frames, channels] in [−1, 1]; floats beyond are cut off there.

        Raises:
            BadValueError: the file has fewer, or a sample is not a finite number.
        """
        raw = content[self.start : self.start + frames * self.channels * self.width]
        if not frames or len(raw) != frames * self.channels * self.width:
            raise BadValueError("must have the samples that it announces, and one at least")
        if self.encoding == "pcm":
            return _from_pcm(raw, self.width).reshape(frames, self.channels)
        floats = np.frombuffer(raw, dtype=f"<f{self.width}").astype(np.float64)
        if not np.isfinite(floats).all():
            raise BadValueError("must have samples that are finite numbers")
        return floats.clip(-1.0, 1.0).reshape(frames, self.channels)


def wav_of(content: bytes) -> Wav:
    """Find a file's samples.

    Raises:
        BadValueError: it is not such a file, is damaged, or its samples are encoded differently.
    """
    if content[:4] == b"RIFX" and content[8:12] == b"WAVE":
        raise BadValueError(f"{_DAMAGED}, little-endian (RIFF, not RIFX)")
    if content[:4] not in (b"RIFF", b"RF64", b"BW64") or content[8:12] != b"WAVE":
        raise BadValueError(_DAMAGED)
    form: bytes | None = None
    longer: dict[bytes, int] = {}
    at = 12
    for _ in range(_MOST_CHUNKS):
        if at + 8 > len(content):
            break
        name, size = content[at : at + 4], int.from_bytes(content[at + 4 : at + 8], "little")
        start = at + 8
        if size == _IN_DS64:
            size = longer.get(name, size)
        if name == b"data":
            if form is None:
                break
            return _located(form, start, _announced(content, start, size))
        if name == b"ds64":
            longer = _lengths(content[start : start + min(size, 28 + 12 * _MOST_CHUNKS)])
        elif name == b"fmt " and form is None:
            form = content[start : start + min(size, 40)]
        at = start + size
        if size % 2 and content[at : at + 4] not in (b"fmt ", b"data"):  # some writers leave the zero byte out
            at += 1
    raise BadValueError(_DAMAGED)


def _lengths(ds64: bytes) -> dict[bytes, int]:
    """Return the lengths of 64 bits, by the chunk's name."""
    if len(ds64) < 24:
        raise BadValueError(_DAMAGED)
    longer = {b"data": int.from_bytes(ds64[8:16], "little")}
    for at in range(28, len(ds64) - 11, 12):
        longer[ds64[at : at + 4]] = int.from_bytes(ds64[at + 4 : at + 12], "little")
    return longer


def _announced(content: bytes, start: int, size: int) -> int:
    """Return how many bytes of samples there should be.

    A stream's writer cannot go back to put the length in: it leaves a very large one, or 0.
    """
    there = len(content) - start
    if (size == 0 and there and not _chunks_follow(content, start)) or (size >= _UNKNOWN and size > there):
        return there
    return size


def _chunks_follow(content: bytes, at: int) -> bool:
    """Whether other chunks fill the file up to its end: then a length of 0 is meant."""
    for _ in range(_MOST_CHUNKS):
        name = content[at : at + 4]
        if len(name) < 4 or not (name.isascii() and name.decode("ascii").isprintable()):
            return False
        size = int.from_bytes(content[at + 4 : at + 8], "little")
        at += 8 + size
        if at <= len(content) <= at + size % 2:
            return True
        at += size % 2
    return False


def _located(form: bytes, start: int, size: int) -> Wav:
    if len(form) < 16:
        raise BadValueError(_DAMAGED)
    tag, channels, rate, _, block, bits = struct.unpack("<HHIIHH", form[:16])
    if tag == _EXTENSIBLE:
        if len(form) < 40 or form[26:40] != _GUID:
            raise BadValueError(f"{_DAMAGED}, not another encoding")
        tag = int.from_bytes(form[24:26], "little")
    if tag not in _WIDTHS:
        raise BadValueError(f"{_DAMAGED}, not {_NAMED.get(tag, 'another encoding')}")
    width = (bits + 7) // 8
    if width not in _WIDTHS[tag]:
        raise BadValueError("must have samples of 8, 16, 24 or 32 bits, or floats of 32 or 64")
    if not channels or block not in (0, channels * width):
        raise BadValueError(_DAMAGED)
    return Wav("pcm" if tag == _PCM else "float", rate, channels, width, start, size // (channels * width))


def _from_pcm(raw: bytes, width: int) -> np.ndarray:
    """Return PCM samples as float64 in [−1, 1); 8 bits are unsigned, more are signed and little-endian."""
    if width == 1:
        return (np.frombuffer(raw, dtype=np.uint8).astype(np.float64) - 128.0) / 128.0
    if width == 3:
        padded = np.zeros((len(raw) // 3, 4), dtype=np.uint8)
        padded[:, 1:] = np.frombuffer(raw, dtype=np.uint8).reshape(-1, 3)
        return padded.view("<i4")[:, 0] / 2.0**31
    return np.frombuffer(raw, dtype=f"<i{width}") / 2.0 ** (8 * width - 1)
