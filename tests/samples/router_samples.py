"""Every router by name, as configuration tables, small enough for six experts or four."""

from __future__ import annotations

from conftest import make_batch, make_config, make_text, make_text_config

ROUTERS = {
    "softmax": {"kind": "softmax", "noise": 0.5, "z_loss": 0.01, "entropy": 0.01},
    "softmax, uniform": {"kind": "softmax", "balance_loss": "uniform"},
    "sigmoid": {"kind": "sigmoid", "noise": 0.1, "entropy": 0.01},
    "softmax, biased": {"kind": "softmax", "noise": 0.5, "selection_bias": True},
    "attention": {"kind": "attention", "heads": 4, "key_width": 4, "noise": 0.5, "z_loss": 0.01},
    "learned groups": {"kind": "hierarchical", "groups": 2, "top_groups": 1, "noise": 0.5, "entropy": 0.01},
    "group-limited": {"kind": "hierarchical", "style": "group-limited", "groups": 2, "top_groups": 1},
    "policy": {"kind": "policy", "rollouts": 3, "z_loss": 0.01, "balance_loss": "uniform"},
    "top-p": {"kind": "top-p", "mass": 0.4, "noise": 0.5, "z_loss": 0.01},
}


def router_config(name, **experts):
    """Images of four tokens, six experts."""
    return make_config(router=ROUTERS[name], **experts)


def router_text_config(name):
    """Text, two layers of causal attention, four experts."""
    experts = {"routed": 4, "shared": 1, "hidden": 8, "top_k": 2, "balance": 0.1, "router": ROUTERS[name]}
    return make_text_config(experts=experts)


def batch_for(config, examples=5):
    return make_text(examples) if config.encoder.kind == "bytes" else make_batch(examples)
