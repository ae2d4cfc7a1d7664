"""The embedded source ``digits``."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from conclave.base.errors import BadInputError
from conclave.data.config import DataConfig

_SPLIT_SEED = 0  # the public test records are the same in every run


def load_digits(config: DataConfig) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Load scikit-learn's 1,797 real 8×8 images of handwritten digits (Alpaydin & Kaynak 1998).

    Values are scaled to [0, 1]. Needs no network.

    Raises:
        BadInputError: ``test_records`` leaves no record for training.
    """
    from sklearn.datasets import load_digits as load_bunch  # takes a third of a second to import

    images, labels = load_bunch(return_X_y=True)
    if config.test_records >= len(labels):
        raise BadInputError(
            f"data.test_records is {config.test_records}, must be below the {len(labels)} records of digits"
        )
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(labels))
    records = {
        "image": torch.from_numpy(images[order] / 16.0).to(torch.float32).view(-1, 1, 8, 8),
        "label": torch.from_numpy(labels[order]).to(torch.int64),
    }
    test = {name: tensor[: config.test_records] for name, tensor in records.items()}
    train = {name: tensor[config.test_records :] for name, tensor in records.items()}
    return train, test
