"""Pictures, decoded by Pillow in memory. A file may be damaged or made to harm."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image

from data.formats.config_parts import PictureConfig
from data.formats.rows import BadValueError

_FORMATS = ("PNG", "JPEG", "BMP")
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)  # what Pillow's decoders raise on damaged files


def picture_from(content: bytes, config: PictureConfig) -> np.ndarray:
    """Return a picture, float32 [channels, height, width] in [0, 1], resized bilinearly.

    Transparency is dropped. A grey picture of 16 bits keeps them.

    Raises:
        BadValueError: it cannot be decoded, or has more pixels than allowed; its size is looked at before its pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow has to say about odd files would name what they hold
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                if image.width * image.height <= config.max_pixels:
                    return _decoded(image, config)
    except _DAMAGED:
        raise BadValueError("must be an undamaged picture (PNG, JPEG or BMP)") from None
    raise BadValueError(f"must be a picture of at most {config.max_pixels} pixels")


def _decoded(image: Image.Image, config: PictureConfig) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255 otherwise
        plain = Image.fromarray(np.asarray(image, dtype=np.float32) / 257.0)
    else:
        plain = image.convert("L" if config.channels == 1 else "RGB")
    if plain.size != (config.width, config.height):
        plain = plain.resize((config.width, config.height), Image.Resampling.BILINEAR)
    array = (np.asarray(plain, dtype=np.float32) / 255.0).clip(0.0, 1.0)
    if array.ndim == 2:
        return np.repeat(array[np.newaxis], config.channels, axis=0)
    return np.ascontiguousarray(array.transpose(2, 0, 1))
