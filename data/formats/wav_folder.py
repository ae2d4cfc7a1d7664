"""A folder of sound files, each turned into a picture."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from conclave.data.formats.config import WavFolderConfig
from conclave.data.formats.folders import folder_rows
from conclave.data.values.log_mel import log_mel
from conclave.data.values.rows import BadValueError, Reading
from conclave.data.values.schema import ImageSchema
from conclave.data.values.wav import wav_of


def read_wav_folder(path: Path, config: WavFolderConfig) -> Reading:
    """Return the sounds of a folder and its sub-folders as pictures; see :mod:`conclave.data.values.log_mel`.

    Raises:
        BadInputError: there is no such folder, or no sound in it.
    """

    def records(content: bytes) -> np.ndarray:
        return log_mel(torch.from_numpy(_sound(content, config)), config).numpy()[np.newaxis]

    schema = ImageSchema(image=(1, config.mels, config.frames), classes=config.class_count)
    return Reading(schema, folder_rows(path, config, (".wav",), config.known(), records))


def _sound(content: bytes, config: WavFolderConfig) -> np.ndarray:
    """Return a file's sound, float32 [samples] in [−1, 1]: mono, at the rate, cut or followed by silence."""
    wav = wav_of(content)
    if wav.rate != config.rate and not (config.resample and 1000 <= wav.rate <= 768_000):
        raise BadValueError(f"must have {config.rate} samples a second")
    needed = math.ceil(config.samples * wav.rate / config.rate) + 1
    frames = min(needed, wav.frames)
    mono = wav.samples(content, frames).mean(axis=1)
    if wav.rate != config.rate:
        at = np.arange(config.samples) * (wav.rate / config.rate)
        mono = np.interp(at[at <= frames - 1], np.arange(frames), mono)
    mono = mono[: config.samples]
    return np.pad(mono, (0, config.samples - len(mono))).astype(np.float32)
