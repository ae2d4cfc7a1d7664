"""Data sources: named tensors whose first axis is the record, split into private and public test records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.config import DataConfig
from model.errors import BadInputError

Records = Mapping[str, Tensor]


@dataclass(frozen=True)
class Schema:
    """What a record looks like; public. ``image`` is (channels, height, width)."""

    image: tuple[int, int, int]
    classes: int


@dataclass(frozen=True)
class DataSet:
    """Training records (to be dealt to nodes) and public test records."""

    schema: Schema
    train: Records
    test: Records


SCHEMAS = {"digits": Schema(image=(1, 8, 8), classes=10)}
"""Schema of each embedded source, known without loading it."""

_SPLIT_SEED = 0  # the public test records are the same in every run


def load(config: DataConfig) -> DataSet:
    """Load a data set.

    ``digits``: scikit-learn's 1,797 real 8×8 images of handwritten digits (Alpaydin & Kaynak 1998), values
    scaled to [0, 1]; needs no network.

    Raises:
        BadInputError: ``test_records`` leaves no record for training.
    """
    from sklearn.datasets import load_digits  # takes a third of a second to import

    images, labels = load_digits(return_X_y=True)
    if config.test_records >= len(labels):
        raise BadInputError(
            f"data.test_records is {config.test_records}, must be below the {len(labels)} records of {config.source}"
        )
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(labels))
    records = {
        "image": torch.from_numpy(images[order] / 16.0).to(torch.float32).view(-1, 1, 8, 8),
        "label": torch.from_numpy(labels[order]).to(torch.int64),
    }
    test = {name: tensor[: config.test_records] for name, tensor in records.items()}
    train = {name: tensor[config.test_records :] for name, tensor in records.items()}
    return DataSet(SCHEMAS[config.source], train, test)


def declared_size(records: int) -> int:
    """Return a simulated node's declared size: its true size rounded to two significant digits, at least 1.

    Privacy: a declared size is public by assumption. Real nodes declare what their owner chooses.
    """
    if records < 100:
        return max(1, records)
    scale = int(10 ** (len(str(records)) - 2))
    return round(records / scale) * scale
