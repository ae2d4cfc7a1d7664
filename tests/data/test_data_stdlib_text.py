"""The standard library as text: windows cut once, whole files held out."""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
import torch

from conclave.base.errors import BadInputError
from conclave.data.config import DataConfig
from conclave.data.sources import load
from conclave.data.stdlib_text import order0_entropy
from conclave.data.values.schema import TextSchema
from conclave.model.config import ModelConfig

CONFIG = DataConfig(source="stdlib-text", test_records=500, window=64)
ROOT = Path(sysconfig.get_path("stdlib"))


@pytest.fixture(scope="module")
def dataset():
    return load(CONFIG)


def held_out(path: Path) -> bool:
    return hashlib.sha256(path.relative_to(ROOT).as_posix().encode()).digest()[0] < 26


def test_every_window_of_a_file_is_on_one_side(dataset):
    train = {bytes(row) for row in dataset.train["text"].numpy()}
    test = {bytes(row) for row in dataset.test["text"].numpy()}
    for name in ("argparse.py", "ast.py", "json/decoder.py", "asyncio/tasks.py", "http/server.py", "inspect.py"):
        path = ROOT / name
        content = path.read_bytes()
        windows = {content[i : i + 64] for i in range(0, len(content) // 64 * 64, 64)}
        if held_out(path):
            assert len(windows & train) < 0.1 * len(windows)  # licence lines and blanks recur elsewhere
        else:
            assert windows <= train
    assert len(test) > 400


def test_windows_are_disjoint_cut_once_and_grouped_by_package(dataset):
    assert dataset.train["text"].dtype == torch.uint8
    assert dataset.train["text"].shape[1] == 64
    assert len(dataset.train["group"]) == len(dataset.train["text"]) > 50_000
    sizes = Counter(dataset.train["group"].tolist())
    assert len(sizes) > 100
    asyncio = [p for p in sorted((ROOT / "asyncio").rglob("*.py")) if not held_out(p)]
    first = dataset.train["text"].numpy().tobytes().find(asyncio[0].read_bytes()[:64])
    assert first >= 0
    assert sizes[int(dataset.train["group"][first // 64])] == sum(len(p.read_bytes()) // 64 for p in asyncio)


def test_it_is_the_same_each_time_and_shaped_as_announced(dataset):
    again = load(CONFIG)
    assert torch.equal(again.train["text"], dataset.train["text"])
    assert torch.equal(again.test["text"], dataset.test["text"])
    assert dataset.test["text"].shape == (500, 64)
    assert dataset.schema == TextSchema(window=64)


def test_the_schema_names_what_does_not_fit():
    text = {"preset": "transformer", "width": 16, "attention": {"heads": 2}, "head": {"kind": "next-byte"}}
    experts = {"experts": {"routed": 2, "hidden": 8, "top_k": 1}}
    fits = ModelConfig.model_validate(text | experts | {"encoder": {"kind": "bytes", "window": 64}})
    wrong = ModelConfig.model_validate(text | experts | {"encoder": {"kind": "bytes", "window": 32}})
    assert TextSchema(window=64).mismatch(fits) is None
    assert TextSchema(window=64).mismatch(wrong) == "model.encoder.window is 32, must be the data's window 64"


def test_entropy_is_the_textbook_formula():
    text = torch.tensor([[0, 0, 0, 0], [1, 1, 2, 3]], dtype=torch.uint8)
    shares = [4 / 8, 2 / 8, 1 / 8, 1 / 8]
    assert order0_entropy(text) == pytest.approx(-sum(p * math.log2(p) for p in shares))
    assert order0_entropy(torch.zeros(3, 3, dtype=torch.uint8)) == 0.0


def test_more_test_windows_than_there_are_is_one_sentence():
    with pytest.raises(BadInputError, match=r"data\.test_records is 10000000, must be at most"):
        load(DataConfig(source="stdlib-text", test_records=10_000_000))
