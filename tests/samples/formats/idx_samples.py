"""Tiny IDX files, written byte by byte as the format's description says."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np


def idx_bytes(values: np.ndarray) -> bytes:
    """Zero, zero, 8 for unsigned bytes, the number of axes, their lengths big-endian, the values."""
    header = struct.pack(">BBBB", 0, 0, 8, values.ndim) + b"".join(struct.pack(">I", n) for n in values.shape)
    return header + b"".join(struct.pack("B", int(value)) for value in values.flatten())


def write_mnist(folder: Path, *, train: int = 40, test: int = 12, packed: bool = True, seed: int = 0) -> None:
    """Write the four files with random pictures; labels go round from 0 to 9, so that every label is there."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    for part, count in (("train", train), ("t10k", test)):
        images = draw.integers(0, 256, (count, 28, 28))
        images[0, 0, :2] = 0, 255  # both ends of the range
        for what, values in (("images-idx3", images), ("labels-idx1", np.arange(count) % 10)):
            content = idx_bytes(values)
            path = folder / f"{part}-{what}-ubyte"
            if packed:
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content, mtime=0))
            else:
                path.write_bytes(content)
