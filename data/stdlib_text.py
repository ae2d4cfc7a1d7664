"""The embedded source ``stdlib-text``: the Python standard library's own source, as bytes."""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from conclave.base.errors import BadInputError
from conclave.data.config import DataConfig

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
_HELD_OUT_OF_256 = 26  # a tenth of the files


def load_stdlib_text(config: DataConfig) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Cut the standard library's modules into disjoint windows of ``config.window`` bytes; a record is a window.

    Windows are cut once, here: the privacy unit is a window, not a file or an author. A tail shorter than
    a window is dropped. Files are in the order of their paths, ``test`` packages left out. Whole files, a tenth of
    them chosen by a hash of their path, are held out; of their windows, ``test_records`` evenly spaced ones are the
    public test records.

    Returns:
        Training records ``text`` uint8 [records, window] and ``group`` int64 [records], the number of the record's
        top-level package; test records ``text``.

    Raises:
        BadInputError: this Python ships no source, or fewer test windows than asked for.
    """
    root = Path(sysconfig.get_path("stdlib"))
    train, groups, test = [], [], []
    numbers: dict[str, int] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _LEFT_OUT & set(relative.parts):
            continue
        windows = _windows(path.read_bytes(), config.window)
        if hashlib.sha256(relative.as_posix().encode()).digest()[0] < _HELD_OUT_OF_256:
            test.append(windows)
            continue
        number = numbers.setdefault(relative.parts[0].removesuffix(".py"), len(numbers))
        train.append(windows)
        groups.append(np.full(len(windows), number, dtype=np.int64))
    if not train or not test:
        raise BadInputError(f"{root}: holds no Python source, stdlib-text needs a Python with its library's source")
    held_out = np.concatenate(test)
    if config.test_records > len(held_out):
        raise BadInputError(
            f"data.test_records is {config.test_records}, must be at most the {len(held_out)} held-out windows"
        )
    chosen = np.linspace(0, len(held_out) - 1, config.test_records).astype(np.int64)
    return (
        {"text": torch.from_numpy(np.concatenate(train)), "group": torch.from_numpy(np.concatenate(groups))},
        {"text": torch.from_numpy(held_out[chosen])},
    )


def _windows(content: bytes, window: int) -> np.ndarray:
    whole = len(content) // window
    return np.frombuffer(content, dtype=np.uint8, count=whole * window).reshape(whole, window).copy()


def order0_entropy(text: Tensor) -> float:
    """Return the entropy of the bytes' own frequencies, in bits a byte: what a model without context can reach."""
    counts = torch.bincount(text.flatten().long(), minlength=256).double()
    share = counts[counts > 0] / counts.sum()
    return float(-(share * share.log()).sum()) / math.log(2.0)
