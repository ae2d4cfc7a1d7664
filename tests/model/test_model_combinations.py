"""Parts of the family that were made apart work together: routers, attention, padding, the byte after next."""

from __future__ import annotations

import pytest
import torch
from conftest import make_batch, make_config, make_text, make_text_config

from conclave.base.errors import BadInputError
from conclave.model.building import build
from conclave.model.config import ModelConfig
from conclave.model.costs import costs_of

ROUTERS = {
    "softmax": {"kind": "softmax", "z_loss": 0.01},
    "sigmoid": {"kind": "sigmoid"},
    "attention": {"kind": "attention", "heads": 2, "key_width": 4},
    "learned groups": {"kind": "hierarchical", "groups": 2, "top_groups": 1},
    "limited groups": {"kind": "hierarchical", "groups": 2, "top_groups": 1, "style": "group-limited"},
    "policy": {"kind": "policy", "rollouts": 2},
    "top-p": {"kind": "top-p", "mass": 0.6},
}
LATENT = {"kind": "latent", "heads": 2, "kv_rank": 8, "rope_width": 4}


def text_config(router: str, **changes) -> ModelConfig:
    document = make_text_config().model_dump(mode="json", exclude_none=True)
    document["experts"]["router"] = ROUTERS[router]
    return ModelConfig.model_validate(document | changes)


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_trains_a_transformer_with_latent_attention_and_two_bytes_ahead(router):
    config = text_config(router, attention=LATENT, head={"kind": "next-byte", "after_next": 0.3})
    network = build(config, seed=1)
    loss_B = network.loss(make_text(3))
    assert loss_B.shape == (3,)
    loss_B.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("router", ROUTERS)
def test_no_router_lets_a_byte_see_those_after_it(router):
    network = build(text_config(router), seed=1).eval()
    first, other = make_text(2), make_text(2)
    other["text"][:, 7:] = 255 - other["text"][:, 7:]
    with torch.no_grad():
        assert torch.equal(network(first).scores[:, :7], network(other).scores[:, :7])


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_is_counted_and_classifies(router):
    config = make_config(router=ROUTERS[router], depth=2, activation="swiglu")
    assert costs_of(config).total == sum(p.numel() for p in build(config, 1).parameters()) + (
        6 if router in ("sigmoid", "limited groups") else 0  # the selection bias travels, but is not trained
    )
    assert build(config, seed=1).loss(make_batch(4)).isfinite().all()


@pytest.mark.parametrize(
    ("router", "balance", "key"),
    [("sigmoid", 0.1, "balance"), ("softmax", 0.0, "router.z_loss"), ("attention", 0.0, "router.kind")],
)
def test_padding_is_refused_where_routing_would_count_it(router, balance, key):
    document = text_config(router).model_dump(mode="json", exclude_none=True)
    document["experts"]["balance"] = balance
    network = build(ModelConfig.model_validate(document), seed=1)
    with pytest.raises(BadInputError, match=f"model.experts.{key} is"):
        network.loss({**make_text(2), "length": torch.tensor([12, 5])})


def test_keys_at_their_defaults_leave_a_hash_alone():
    """A run goes on, and repeats its noise, across versions that only added keys."""
    plain = make_config()
    assert '"router":{' not in plain.json_for_hash()
    assert '"router":{' in make_config(router=ROUTERS["sigmoid"]).json_for_hash()
    assert make_config(router={"kind": "softmax"}).json_for_hash() == plain.json_for_hash()
