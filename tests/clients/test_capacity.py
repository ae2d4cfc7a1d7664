"""From memory to experts: the arithmetic by hand, what a node declares, and what it refuses to be sent."""

from __future__ import annotations

import pytest
from conftest import make_config, make_text_config
from router_samples import ROUTERS, router_config

from conclave.clients.capacity import experts_that_fit
from conclave.clients.policy import Policy
from conclave.model import parameters
from conclave.model.config import ModelConfig

MIB = 2**20


def count(config, held):
    return sum(shape.numel() for shape in parameters.shapes(config, held).values())


def test_capacity_is_what_is_left_over_what_an_expert_takes():
    wide = {
        "width": 512,
        "encoder": {"kind": "image-patch", "height": 8, "width": 8, "patch": 8},
        "experts": {"routed": 64, "hidden": 4096, "top_k": 1},
        "head": {"kind": "classification", "classes": 10},
    }
    config = ModelConfig.model_validate(wide)
    expert = 2 * 512 * 4096 + 512  # up, down, and the router's row
    shared = 64 * 512 + 512 * 10 + 2 * 512  # embedding, head, two norms
    assert count(config, config.all_experts) == pytest.approx(shared + 64 * expert, abs=1024)
    shared = count(config, config.all_experts) - 64 * expert
    for held in (0, 1, 2, 5, 63, 64):
        need = (1 << 30) + 48 * (shared + held * expert)
        assert experts_that_fit(config, -(-need // MIB)) == held
        assert experts_that_fit(config, need // MIB - 1) == max(0, held - 1)
    assert experts_that_fit(config, 2**30) == 64


@pytest.mark.parametrize("config", [make_config(), make_text_config(), *map(router_config, ROUTERS)])
def test_whatever_the_model_what_fits_takes_no_more_than_there_is_and_one_more_would(config):
    for memory in (1025, 1026, 1030):
        fits = experts_that_fit(config, memory)
        for held, within in ((fits, True), (fits + 1, False)):
            if 1 <= held <= config.experts.routed:
                taken = (1 << 30) + 48 * count(config, {layer: tuple(range(held)) for layer in range(config.layers)})
                assert (taken <= memory * MIB) == within


def test_without_room_for_a_batch_nothing_fits():
    assert experts_that_fit(make_config(), 1024) == 0


def test_both_bounds_count_and_a_model_that_may_not_be_imported_is_not():
    config = make_config()
    assert Policy().capacity(config) == 4096
    assert Policy(memory_mb=4096).capacity(config) == 6
    assert Policy(memory_mb=4096, expert_capacity=2).capacity(config) == 2
    assert Policy(memory_mb=1).capacity(config) == 0
    own = config.model_copy(update={"preset": "own", "source": "no_such_module:build"})
    assert Policy(memory_mb=1, expert_capacity=3).capacity(own) == 3
