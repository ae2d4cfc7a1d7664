"""The embedded data set, against scikit-learn's own copy; declared sizes."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from conclave.base.errors import BadInputError
from conclave.data.config import DataConfig
from conclave.data.sources import declared_size, load
from conclave.data.values.schema import ImageSchema

DIGITS = DataConfig(source="digits")


def contents(records):
    """Each record as (its 64 grey values 0 to 16, its label)."""
    grey = (records["image"] * 16).reshape(len(records["label"]), 64)
    assert torch.equal(grey, grey.round())
    return [(tuple(map(int, row)), int(label)) for row, label in zip(grey, records["label"], strict=True)]


def test_train_and_test_together_are_scikit_learns_records_each_once():
    dataset = load(DIGITS)
    images, labels = load_digits(return_X_y=True)
    expected = Counter((tuple(map(int, row)), int(label)) for row, label in zip(images, labels, strict=True))
    train, test = contents(dataset.train), contents(dataset.test)
    assert (len(train), len(test)) == (1437, 360)
    assert Counter(train + test) == expected
    assert expected.total() == 1797
    assert not set(train) & set(test)


def test_records_look_as_the_schema_says():
    dataset = load(DIGITS)
    for records in (dataset.train, dataset.test):
        assert records["image"].dtype == torch.float32
        assert tuple(records["image"].shape[1:]) == dataset.schema.image
        assert (records["image"].min().item(), records["image"].max().item()) == (0.0, 1.0)
        assert records["label"].dtype == torch.int64
        assert set(records["label"].tolist()) == set(range(dataset.schema.classes))
    assert dataset.schema == ImageSchema(image=(1, 8, 8), classes=10)


def test_the_split_is_the_same_every_time():
    one = load(DIGITS)
    np.random.default_rng(5)
    torch.manual_seed(5)
    two = load(DIGITS)
    for name in ("image", "label"):
        assert torch.equal(one.train[name], two.train[name])
        assert torch.equal(one.test[name], two.test[name])


def test_the_split_is_shuffled():
    """scikit-learn's order is by writer: an unshuffled test set would hold the first writers only."""
    images, _ = load_digits(return_X_y=True)
    position = {tuple(map(int, row)): i for i, row in enumerate(images)}
    where = [position[image] for image, _ in contents(load(DIGITS).test)]
    below = sum(i < 1797 / 2 for i in where)
    assert 130 < below < 230  # ±5.9 standard deviations of the hypergeometric count 180 ± 8.5
    assert where != sorted(where)


@pytest.mark.parametrize("test_records", [1, 1796])
def test_sizes_follow_test_records(test_records):
    dataset = load(DataConfig(source="digits", test_records=test_records))
    assert (len(dataset.test["label"]), len(dataset.train["label"])) == (test_records, 1797 - test_records)


@pytest.mark.parametrize("test_records", [1797, 5000])
def test_no_training_record_left_is_bad_input(test_records):
    with pytest.raises(BadInputError, match=f"test_records is {test_records}, must be below the 1797 records"):
        load(DataConfig(source="digits", test_records=test_records))


@pytest.mark.parametrize(
    ("records", "declared"),
    [
        (0, 1),
        (1, 1),
        (9, 9),
        (10, 10),
        (99, 99),
        (100, 100),
        (104, 100),
        (106, 110),
        (143, 140),
        (147, 150),
        (994, 990),
        (996, 1000),
        (1437, 1400),
        (1450, 1400),
        (1451, 1500),
        (99_499, 99_000),
        (99_501, 100_000),
        (123_456_789, 120_000_000),
    ],
)
def test_declared_size(records, declared):
    assert declared_size(records) == declared


def test_a_declared_size_has_two_significant_digits_and_is_the_nearest():
    for records in range(1, 12_000):
        declared = declared_size(records)
        assert declared >= 1
        assert len(Decimal(declared).normalize().as_tuple().digits) <= 2
        scale = 10 ** max(0, len(str(records)) - 2)
        assert 2 * abs(declared - records) <= scale
