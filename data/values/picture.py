"""Pictures, encoded or as arrays, for training and for prediction alike. A file may be damaged or malicious."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image

from conclave.data.values.config import PictureConfig
from conclave.data.values.rows import BadValueError

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
_ORIENTATION = 0x0112  # the tag of EXIF 2.32, section 4.6.4
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def picture_from(content: bytes, config: PictureConfig) -> np.ndarray:
    """Return a picture, float32 [channels, height, width] in [0, 1], upright, resized bilinearly.

    It is turned as its EXIF orientation says, as cameras and viewers do. Transparency is dropped, not laid over a
    background, and colour profiles are not applied. A grey picture of 16 bits keeps them; of coloured ones the upper 8
    count. Of several pictures in a file the first is taken.

    Raises:
        BadValueError: it cannot be decoded, or has more pixels than allowed; its size is checked before its pixels.
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


def picture_of_array(values: np.ndarray) -> np.ndarray:
    """Return a picture that is an array, float32 of the same shape in [0, 1].

    Args:
        values: uint8, of which 255 is 1; or floats in [0, 1].

    Raises:
        BadValueError: it is neither.
    """
    if values.dtype == np.uint8:
        return values.astype(np.float32) / np.float32(255.0)
    if values.dtype.kind != "f":
        raise BadValueError("a picture's values must be uint8, or floats in [0, 1]")
    if not (np.isfinite(values).all() and values.min(initial=0.0) >= 0.0 and values.max(initial=0.0) <= 1.0):
        raise BadValueError("a picture's values must be in [0, 1]")
    return values.astype(np.float32)


def _decoded(image: Image.Image, config: PictureConfig) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255 otherwise
        plain = Image.fromarray(np.asarray(image, dtype=np.float32) / 257.0)
    else:
        plain = image.convert("L" if config.channels == 1 else "RGB")
    turn = _UPRIGHT.get(_orientation(image))  # of PNG files only once its pixels are read
    if turn is not None:
        plain = plain.transpose(turn)
    if plain.size != (config.width, config.height):
        plain = plain.resize((config.width, config.height), Image.Resampling.BILINEAR)
    array = (np.asarray(plain, dtype=np.float32) / 255.0).clip(0.0, 1.0)
    if array.ndim == 2:
        return np.repeat(array[np.newaxis], config.channels, axis=0)
    return np.ascontiguousarray(array.transpose(2, 0, 1))


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1, upright, where there is none or it cannot be read: so viewers do."""
    try:
        found = image.getexif().get(_ORIENTATION)
    except _DAMAGED:
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1
