"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from conclave.model.config import ModelConfig
from conclave.model.records import Batch
from conclave.protocol.messages import TrainReply
from conclave.server.replies.receipts import EMPTY_RECEIPT

gc.disable()  # until all tests are collected

pytest_plugins = ["soak_fixtures"]
"""A conftest.py of the soak's own would hide this file's helpers from the other tests."""


@pytest.fixture(autouse=True)
def _one_thread_fixed_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def make_config(**experts) -> ModelConfig:
    """A small model: 8×8 images in four patches, six routed experts, top-2, one shared expert."""
    return ModelConfig.model_validate(
        {
            "width": 16,
            "encoder": {"kind": "image-patch", "height": 8, "width": 8, "patch": 4},
            "experts": {"routed": 6, "shared": 1, "hidden": 8, "top_k": 2, "balance": 0.1} | experts,
            "head": {"kind": "classification", "classes": 5},
        }
    )


def make_text_config(**changes) -> ModelConfig:
    """A small transformer: windows of 12 bytes, two layers, two heads, four routed experts, top-2."""
    document = {
        "preset": "transformer",
        "width": 16,
        "layers": 2,
        "attention": {"heads": 2},
        "encoder": {"kind": "bytes", "window": 12},
        "experts": {"routed": 4, "shared": 1, "hidden": 8, "top_k": 2, "balance": 0.1},
        "head": {"kind": "next-byte"},
    }
    return ModelConfig.model_validate(document | changes)


def make_text(examples: int, window: int = 12, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {"text": torch.randint(256, (examples, window), generator=generator, dtype=torch.uint8)}


def make_reply(number: int = 0) -> TrainReply:
    """A reply whose receipt proves nothing."""
    return TrainReply(charge_id=f"{number:064x}", receipt=EMPTY_RECEIPT)


@pytest.fixture
def config() -> ModelConfig:
    return make_config()


def make_batch(examples: int, classes: int = 5, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.rand(examples, 1, 8, 8, generator=generator),
        "label": torch.randint(classes, (examples,), generator=generator),
    }


def make_table(examples: int, features: int = 7, classes: int = 5, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {
        "table": torch.randn(examples, features, generator=generator),
        "label": torch.randint(classes, (examples,), generator=generator),
    }


def in_the_soak_unless(always: Iterable[object], every: Iterable[object]) -> list:
    """Return parameters of a costly test: all of them run by `make soak`, by `make test` those that always do."""
    always = list(always)
    return [
        pytest.param(*(one if isinstance(one, tuple) else (one,)), marks=() if one in always else pytest.mark.slow)
        for one in every
    ]


def load_benchmark(name: str) -> ModuleType:
    """Import ``benchmarks/learning/<name>.py``, which may import its siblings by their bare names."""
    folder = Path(__file__).parents[1] / "benchmarks" / "learning"
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


def pytest_collection_finish() -> None:
    """Libraries and tests stay: the garbage collector need not look through them again and again."""
    gc.freeze()
    gc.enable()
