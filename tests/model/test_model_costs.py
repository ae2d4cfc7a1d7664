"""Costs against counting by hand."""

from __future__ import annotations

import pytest
from conftest import make_config, make_text_config

from conclave.model.building import build
from conclave.model.costs import costs_of


def test_a_moe_without_attention_is_two_operations_for_each_active_parameter():
    config = make_config(shared=2)
    costs = costs_of(config)
    width, hidden, experts = 16, 8, 6
    one = 2 * width * hidden
    patch = 16 * width + 4 * width  # embedding and positions
    norms = 2 * width
    shared = patch + norms + 2 * width * (2 * hidden) + width * 5
    assert costs.parameters == {"shared": shared, "router": experts * width, "expert": experts * one}
    assert (costs.total, costs.expert) == (shared + experts * width + experts * one, one)
    assert costs.active == costs.total - 4 * one  # four of six are not chosen
    per_token = 2 * (16 * width + experts * width + 2 * one + 2 * width * 2 * hidden) + 2 * width * 5 / 4
    assert costs.flops_per_token == pytest.approx(per_token, abs=1)  # one score for four tokens


def test_attention_counts_every_pair_of_tokens():
    config = make_text_config()
    width, hidden, window, layers = 16, 8, 12, 2
    projections = 4 * width * width
    pairs = 2 * window * width  # scores and mixing: a product of width numbers with each of the window's tokens
    experts = (2 + 1) * 2 * width * hidden + 4 * width  # chosen and shared ones, and the router
    per_token = 2 * (layers * (projections + pairs + experts) + 256 * width)
    assert costs_of(config).flops_per_token == pytest.approx(per_token, abs=1)


@pytest.mark.parametrize("config", [make_config(), make_text_config()])
def test_the_total_is_what_the_network_holds(config):
    assert costs_of(config).total == sum(p.numel() for p in build(config, seed=1).parameters())
