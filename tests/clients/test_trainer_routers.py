"""A node trains the experts it was sent, known by their global ids, whatever router scores them."""

from __future__ import annotations

import pytest
import torch
from conftest import make_batch
from router_samples import ROUTERS, router_config

from conclave.clients.trainer import train
from conclave.model import parameters
from conclave.model.building import build
from conclave.protocol.plan import Plan

BATCH = make_batch(12)


def trained(config, held):
    wire = parameters.split(build(config, 1).state_dict(), config.all_experts)
    tensors = {name: wire[name] for name in parameters.select(wire, held)}
    plan = Plan.model_validate(
        {
            "model": config,
            "privacy": {"mechanism": "none", "epsilon": 8.0, "delta": 1e-5, "clip": 1.0, "sampling_rate": 0.5},
            "training": {"learning_rate": 0.5, "steps": 1},
            "rounds": 1,
            "noise_multiplier": None,
        }
    )
    return tensors, train(plan, held, tensors, BATCH, 12, bytes(32)).delta


@pytest.mark.parametrize("name", ROUTERS)
def test_the_delta_has_every_tensor_and_the_selection_bias_stays(name):
    tensors, delta = trained(router_config(name), {0: (1, 2, 5)})
    assert delta.keys() == tensors.keys()
    for wire_name, tensor in delta.items():
        assert bool(tensor.isfinite().all())
        if wire_name.endswith("selection_bias"):
            assert tensor.tolist() == [0.0]


@pytest.mark.parametrize("held", [(0, 1), (0, 5), (4, 5), (0, 3)])
def test_groups_are_those_of_the_experts_held_this_time(held):
    """Networks of two experts are kept between rounds; in (0, 5) the experts are of two groups, in (4, 5) of one."""
    config = router_config("learned groups")
    _, delta = trained(config, {0: held})
    group = delta["shared/blocks.0.moe.router.common.group.weight"]
    assert bool(group.any()) == (held[0] // 3 != held[1] // 3)  # a softmax over one group present learns nothing
    alone = trained(config, {0: held})[1]
    assert all(torch.equal(alone[name], tensor) for name, tensor in delta.items())
