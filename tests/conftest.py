"""Fixtures shared by all tests."""

from __future__ import annotations

import pytest
import torch

from model import Batch, ModelConfig


@pytest.fixture(autouse=True)
def _one_thread_fixed_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def make_config(**experts) -> ModelConfig:
    """A small model: 8×8 images in four patches, six routed experts, top-2, one shared expert."""
    return ModelConfig.model_validate(
        {
            "width": 16,
            "encoder": {"height": 8, "width": 8, "patch": 4},
            "experts": {"routed": 6, "shared": 1, "hidden": 8, "top_k": 2, "balance": 0.1} | experts,
            "head": {"classes": 5},
        }
    )


@pytest.fixture
def config() -> ModelConfig:
    return make_config()


def make_batch(examples: int, classes: int = 5, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.rand(examples, 1, 8, 8, generator=generator),
        "label": torch.randint(classes, (examples,), generator=generator),
    }
