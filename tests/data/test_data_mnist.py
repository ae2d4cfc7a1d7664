"""The source mnist: tiny files in the right format, everything that can be wrong with them, and the real ones."""

from __future__ import annotations

import gzip
import os

import numpy as np
import pytest
import torch
from idx_samples import idx_bytes, write_mnist

from conclave.base.errors import BadInputError
from conclave.data.config import DataConfig, DirichletPartition, IidPartition
from conclave.data.data_folder import DATA_VARIABLE
from conclave.data.partition import partition
from conclave.data.sources import load, records_if_absent, schema_of
from conclave.data.values.schema import ImageSchema

MNIST = DataConfig(source="mnist", test_records=10_000)
needs_files = pytest.mark.skipif(not os.environ.get(DATA_VARIABLE), reason=f"{DATA_VARIABLE} is not set")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("subfolder", ["", "mnist"])
def test_records_are_the_files_bytes_over_255(folder, subfolder, packed):
    write_mnist(folder / subfolder, packed=packed, seed=4)
    dataset = load(MNIST)
    draw = np.random.default_rng(4)
    for records, count in ((dataset.train, 40), (dataset.test, 12)):
        grey = draw.integers(0, 256, (count, 28, 28))
        grey[0, 0, :2] = 0, 255
        assert records["image"].dtype == torch.float32
        assert tuple(records["image"].shape) == (count, *dataset.schema.image)
        np.testing.assert_array_equal((records["image"] * 255).round().int().numpy()[:, 0], grey)
        assert (float(records["image"].min()), float(records["image"].max())) == (0.0, 1.0)
        assert records["label"].dtype == torch.int64
        assert records["label"].tolist() == [n % 10 for n in range(count)]
    assert dataset.schema == schema_of(MNIST) == ImageSchema(image=(1, 28, 28), classes=10)


def test_test_records_caps_those_used(folder):
    write_mnist(folder)
    some = load(DataConfig(source="mnist", test_records=5))
    assert torch.equal(some.test["image"], load(MNIST).test["image"][:5])
    assert (len(some.test["label"]), len(some.train["label"])) == (5, 40)


def test_the_folder_is_named_by_the_variable(monkeypatch, tmp_path):
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    with pytest.raises(BadInputError, match=f"the environment variable {DATA_VARIABLE} is not set: must name"):
        load(MNIST)
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(BadInputError, match=r"nowhere: no t10k-images-idx3-ubyte there, must hold it or mnist/t10k"):
        load(MNIST)


@pytest.mark.parametrize("what", ["images-idx3", "labels-idx1"])
@pytest.mark.parametrize("part", ["train", "t10k"])
def test_a_file_that_is_missing_damaged_or_of_another_shape_is_named(folder, part, what):
    write_mnist(folder / "mnist")
    path = folder / "mnist" / f"{part}-{what}-ubyte.gz"
    content = path.read_bytes()
    other = np.zeros((12, 28, 27) if what == "images-idx3" else (12, 1), dtype=int)
    for damaged in (b"", content[:-3], content[: len(content) // 2], b"not gz", gzip.compress(idx_bytes(other))):
        path.write_bytes(damaged)
        with pytest.raises(BadInputError, match=f"{part}-{what}-ubyte.gz: .*must be"):
            load(MNIST)
    path.unlink()
    with pytest.raises(BadInputError, match=f"no {part}-{what}-ubyte there"):
        load(MNIST)


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (np.arange(11) % 10, "holds 11 labels, must be one for each of the 12 images"),
        (np.full(12, 10), "holds a label 10, must be below 10"),
    ],
)
def test_labels_must_fit(folder, labels, sentence):
    write_mnist(folder)
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels)))
    with pytest.raises(BadInputError, match=sentence):
        load(MNIST)


def test_how_many_records_there_would_be_is_known_without_the_files(folder):
    assert records_if_absent(MNIST) == 60_000
    write_mnist(folder)
    assert records_if_absent(MNIST) is None
    assert records_if_absent(DataConfig(source="digits")) is None


@needs_files
def test_the_original_files():
    """Counts, label counts and means are as published with the data set."""
    dataset = load(MNIST)
    assert (len(dataset.train["label"]), len(dataset.test["label"])) == (60_000, 10_000)
    assert torch.bincount(dataset.train["label"]).tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949
    ]  # fmt: skip
    assert dataset.test["label"][:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert float(dataset.train["image"].double().mean()) == pytest.approx(0.1307, abs=1e-4)
    assert float(dataset.train["image"].double().std()) == pytest.approx(0.3081, abs=1e-4)
    for config in (
        IidPartition(scheme="iid", nodes=10),
        DirichletPartition(scheme="dirichlet", nodes=10, alpha=0.3),
    ):
        shares = partition(dataset.train, config, seed=1)
        assert np.array_equal(np.sort(np.concatenate(shares)), np.arange(60_000))
