"""Evaluation against loops over single examples."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make_batch, make_config

from conclave.model import parameters
from conclave.model.building import build
from conclave.server.evaluate.public import evaluate


def router_choices(network, image, top_k):
    """The experts of every token of one image, from the router's scores alone."""
    x_TD = network.encoder(image)[0]
    scores_TE = network.blocks[0].norm(x_TD) @ network.blocks[0].moe.router.score.weight.T
    return [sorted(range(6), key=lambda e: -row[e].item())[:top_k] for row in scores_TE]


@pytest.mark.parametrize("top_k", [1, 2])
def test_accuracy_loss_and_load_equal_a_loop(top_k):
    config = make_config(top_k=top_k)
    network, test = build(config, 3), make_batch(40)
    got = evaluate(config, parameters.split(network.state_dict(), network.held), test)
    hits, losses, counts = 0, 0.0, [0] * 6
    with torch.no_grad():
        for image, label in zip(test["image"], test["label"].tolist(), strict=True):
            scores = network({"image": image[None]}).scores[0].tolist()
            hits += max(range(5), key=scores.__getitem__) == label
            losses += math.log(sum(math.exp(s) for s in scores)) - scores[label]
            for chosen in router_choices(network, image[None], top_k):
                for e in chosen:
                    counts[e] += 1
    assert 0 < hits < 40
    assert got.accuracy == pytest.approx(hits / 40, abs=1e-6)
    assert got.loss == pytest.approx(losses / 40, abs=1e-4)
    assert len(got.load) == 1
    assert got.load[0] == pytest.approx([c / (40 * 4 * top_k) for c in counts], abs=1e-12)
    assert sum(got.load[0]) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("shared", [0, 1])
def test_without_experts_the_residual_and_shared_path_remain(shared):
    config = make_config(shared=shared)
    network, test = build(config, 3), make_batch(60)
    with torch.no_grad():
        for matrix in (network.blocks[0].moe.experts.up, network.blocks[0].moe.experts.down):
            matrix.weight.mul_(4.0)  # so that silencing them shows
        x_BTD = network.encoder(test["image"])
        if shared:
            x_BTD = x_BTD + network.blocks[0].moe.shared(network.blocks[0].norm(x_BTD))
        scores = network.head(network.norm(x_BTD))
        expected = sum(int(s.argmax()) == int(label) for s, label in zip(scores, test["label"], strict=True)) / 60
        with_experts = (network(test).scores.argmax(1) == test["label"]).double().mean().item()
    got = evaluate(config, parameters.split(network.state_dict(), network.held), test)
    assert got.accuracy_without_experts == pytest.approx(expected, abs=1e-6)
    assert got.accuracy == pytest.approx(with_experts, abs=1e-6)
    assert abs(expected - with_experts) > 1e-3  # the two can be told apart


def test_a_perfect_and_a_useless_model():
    config, test = make_config(), make_batch(30)
    network = build(config, 3)
    wire = parameters.split(network.state_dict(), network.held)
    predicted = network(test).scores.argmax(1)
    assert evaluate(config, wire, test | {"label": predicted}).accuracy == 1.0
    assert evaluate(config, wire, test | {"label": (predicted + 1) % 5}).accuracy == 0.0


def test_evaluation_changes_nothing():
    config = make_config()
    network = build(config, 3)
    wire = parameters.split(network.state_dict(), network.held)
    before = {name: t.clone() for name, t in wire.items()}
    first = evaluate(config, wire, make_batch(10))
    assert evaluate(config, wire, make_batch(10)) == first
    assert all(torch.equal(wire[name], before[name]) for name in wire)
