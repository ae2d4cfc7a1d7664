"""The table ``experts.router``: one kind, its own keys, fields checked together."""

from __future__ import annotations

import pytest
from conftest import make_config
from pydantic import ValidationError
from router_samples import ROUTERS, router_config

from conclave.base.explain import explain
from conclave.model.config import ModelConfig


@pytest.mark.parametrize("name", ROUTERS)
def test_every_sample_is_accepted_and_survives_json(name):
    config = router_config(name)
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config


def test_the_default_is_the_plain_softmax():
    assert make_config().experts.router.model_dump() == {
        "kind": "softmax", "balance_loss": "sequence", "entropy": 0.0, "noise": 0.0, "z_loss": 0.0,
        "selection_bias": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("router", "sentence"),
    [
        ({"kind": "hash"}, "kind is 'hash', must be one of attention, hierarchical, policy, sigmoid, softmax, top-p"),
        ({"kind": "softmax", "heads": 2}, "experts.router.heads has no place beside the other keys of experts.router"),
        ({"kind": "softmax", "nosie": 1.0}, "experts.router.nosie, the nearest known key is experts.router.noise"),
        ({"kind": "policy", "rollouts": 1}, "experts.router.rollouts is 1, must be greater than or equal to 2"),
        ({"kind": "policy", "noise": 1.0}, "experts.router.noise has no place beside"),
        ({"kind": "top-p", "mass": 0.0}, "experts.router.mass is 0.0, must be greater than 0"),
        ({"kind": "top-p", "mass": 1.5}, "experts.router.mass is 1.5, must be less than or equal to 1"),
        ({"kind": "attention", "heads": 3}, "router.heads is 3, times key_width 16 must be at most the width 16"),
        ({"kind": "hierarchical", "groups": 4, "top_groups": 2}, "groups is 4, must divide the 6 routed experts"),
        ({"kind": "hierarchical", "groups": 2, "top_groups": 3}, "top_groups is 3, must be at most the 2 groups"),
        (
            {"kind": "hierarchical", "style": "group-limited", "groups": 6, "top_groups": 3},
            "router.groups is 6, must be at most 3 for style group-limited: a group counts as much as its best two",
        ),
        (
            {"kind": "hierarchical", "groups": 6, "top_groups": 1},
            "top_k is 2, must be at most the 1 experts of router.top_groups",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_key_value_and_bound(router, sentence):
    document = make_config().model_dump()
    document["experts"]["router"] = router
    with pytest.raises(ValidationError) as caught:
        ModelConfig.model_validate(document)
    assert sentence in explain(caught.value, ModelConfig)
