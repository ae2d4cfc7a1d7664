"""A folder of sound files, each turned into a picture."""

from __future__ import annotations

import io
import math
import wave
from pathlib import Path

import numpy as np
import torch

from data.formats.config import WavFolderConfig
from data.formats.folders import folder_rows
from data.formats.log_mel import log_mel
from data.formats.rows import BadValueError, Reading
from data.schema import ImageSchema

_EXTENSIBLE = b"\xfe\xff"
_PCM_GUID = b"\x01\x00\x00\x00\x00\x00\x10\x00\x80\x00\x00\xaa\x00\x38\x9b\x71"


def read_wav_folder(path: Path, config: WavFolderConfig) -> Reading:
    """Return the sounds of a folder and its sub-folders as pictures; see :mod:`data.formats.log_mel`.

    Raises:
        BadInputError: there is no such folder, or no sound in it.
    """

    def records(content: bytes) -> np.ndarray:
        return log_mel(torch.from_numpy(_sound(content, config)), config).numpy()[np.newaxis]

    schema = ImageSchema(image=(1, config.mels, config.frames), classes=config.class_count)
    return Reading(schema, folder_rows(path, config, (".wav",), config.known(), records))


def _sound(content: bytes, config: WavFolderConfig) -> np.ndarray:
    """Return a file's sound, float32 [samples] in [−1, 1]: mono, at the rate, cut or followed by silence."""
    try:
        with wave.open(io.BytesIO(_plain(content))) as sound:
            rate, channels, width = sound.getframerate(), sound.getnchannels(), sound.getsampwidth()
            if rate != config.rate and not (config.resample and 1000 <= rate <= 768_000):
                raise BadValueError(f"must have {config.rate} samples a second")
            needed = math.ceil(config.samples * rate / config.rate) + 1
            frames = min(needed, sound.getnframes())
            raw = sound.readframes(frames)
    except (wave.Error, EOFError, RuntimeError, OverflowError, MemoryError):  # what the reader raises on damaged files
        raise BadValueError("must be an undamaged WAV file of PCM samples") from None
    if not frames or len(raw) != frames * channels * width:
        raise BadValueError("must have the samples that it announces, and one at least")
    mono = _samples(raw, width).reshape(frames, channels).mean(axis=1)
    if rate != config.rate:
        at = np.arange(config.samples) * (rate / config.rate)
        mono = np.interp(at[at <= frames - 1], np.arange(frames), mono)
    mono = mono[: config.samples]
    return np.pad(mono, (0, config.samples - len(mono))).astype(np.float32)


def _plain(content: bytes) -> bytes:
    """Return a file whose header says that its samples are PCM in the one way that every version of ``wave`` reads.

    Many programs write samples of more than 16 bits with the longer header, where the format is a GUID.
    """
    at = content.find(b"fmt ", 12, 4096)
    if at >= 0 and content[at + 8 : at + 10] == _EXTENSIBLE and content[at + 32 : at + 48] == _PCM_GUID:
        return content[: at + 8] + _PCM_GUID[:2] + content[at + 10 :]
    return content


def _samples(raw: bytes, width: int) -> np.ndarray:
    """Return PCM samples as float64 in [−1, 1); 8 bits are unsigned, more are signed and little-endian."""
    if width == 1:
        return (np.frombuffer(raw, dtype=np.uint8).astype(np.float64) - 128.0) / 128.0
    if width == 3:
        padded = np.zeros((len(raw) // 3, 4), dtype=np.uint8)
        padded[:, 1:] = np.frombuffer(raw, dtype=np.uint8).reshape(-1, 3)
        return padded.view("<i4")[:, 0] / 2.0**31
    if width in (2, 4):
        return np.frombuffer(raw, dtype=f"<i{width}") / 2.0 ** (8 * width - 1)
    raise BadValueError("must have samples of 8, 16, 24 or 32 bits")
