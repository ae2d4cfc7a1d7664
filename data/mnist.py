"""The source ``mnist``: the original four IDX files, which the user provides."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from conclave.base.errors import BadInputError
from conclave.data.config import DataConfig
from conclave.data.data_folder import find_data
from conclave.data.formats.idx import read_idx

SIDE = 28
CLASSES = 10
_TRAINING_RECORDS = 60_000


def load_mnist(config: DataConfig) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Load handwritten digits (LeCun et al. 1998): ``image`` float32 [n, 1, 28, 28] in [0, 1], ``label`` int64 [n].

    Training records are those of ``train-…``; test records the first ``config.test_records`` of ``t10k-…``.

    Raises:
        BadInputError: a file is missing, damaged or of another shape; see :mod:`conclave.data.formats.idx`.
    """
    test = {name: tensor[: config.test_records] for name, tensor in _records("t10k").items()}
    return _records("train"), test


def mnist_records_if_absent() -> int | None:
    """Return the published number of training records if the files are not here."""
    try:
        find_data("mnist", _file("train", "images"))
    except BadInputError:
        return _TRAINING_RECORDS
    return None


def _file(part: str, what: str) -> str:
    return f"{part}-{what}-idx{3 if what == 'images' else 1}-ubyte"


def _records(part: str) -> dict[str, Tensor]:
    images = read_idx(find_data("mnist", _file(part, "images")), (SIDE, SIDE))
    path = find_data("mnist", _file(part, "labels"))
    labels = read_idx(path, ())
    if len(labels) != len(images):
        raise BadInputError(f"{path}: holds {len(labels)} labels, must be one for each of the {len(images)} images")
    if labels.max() >= CLASSES:
        raise BadInputError(f"{path}: holds a label {labels.max()}, must be below {CLASSES}")
    return {
        "image": torch.from_numpy(images.copy()).view(-1, 1, SIDE, SIDE).to(torch.float32).div_(255.0),
        "label": torch.from_numpy(labels.copy()).to(torch.int64),
    }
