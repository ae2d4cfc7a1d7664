"""Sampling without replacement and REINFORCE, against enumeration."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy import stats

from conclave.model.building import build
from conclave.model.config import ModelConfig
from conclave.model.routers.config import PolicyRouterConfig
from conclave.model.routers.policy import PolicyRouter, plackett_luce, reinforced

PHI = torch.tensor([0.3, -1.0, 1.2, 0.1], dtype=torch.float64)


def log_probability(order, phi=PHI):
    """Drawing one after the other from a softmax over what is left."""
    left, total = list(range(len(phi))), torch.zeros((), dtype=phi.dtype)
    for e in order:
        total = total + phi[e] - torch.stack([phi[i] for i in left]).logsumexp(0)
        left.remove(e)
    return total


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_plackett_luce_equals_enumeration_and_sums_to_one(top_k):
    orders = list(itertools.permutations(range(4), top_k))
    found = plackett_luce(PHI.expand(1, len(orders), 4), torch.tensor(orders).unsqueeze(0))[0]
    torch.testing.assert_close(found, torch.stack([log_probability(order) for order in orders]))
    assert found.exp().sum().item() == pytest.approx(1.0, abs=1e-12)


def test_plackett_luce_with_a_forbidden_expert_is_that_of_the_others():
    phi = torch.tensor([0.3, float("-inf"), 1.2, 0.1], dtype=torch.float64, requires_grad=True)
    found = plackett_luce(phi.view(1, 1, 4), torch.tensor([[[2, 0, 3]]]))
    assert found.item() == pytest.approx(log_probability([1, 0, 2], PHI[[0, 2, 3]]).item(), abs=1e-12)
    found.sum().backward()
    assert bool(phi.grad.isfinite().all())
    assert phi.grad[1] == 0.0


def test_sampled_orders_have_the_stated_probabilities():
    """χ² over all ordered pairs; 1e-6 false alarms for a fresh seed, this one is fixed."""
    router = PolicyRouter(8, 4, 2, PolicyRouterConfig())
    with torch.no_grad():
        router.score.weight.zero_()
        router.score.weight[:, 0] = PHI.float()
    draws = 40_000
    chosen = router.route(torch.eye(8)[:1].expand(draws, 1, 8), torch.ones(4, dtype=torch.bool)).experts_BTK[:, 0]
    orders = list(itertools.permutations(range(4), 2))
    counts = [int((chosen == torch.tensor(order)).all(1).sum()) for order in orders]
    expected = [draws * float(log_probability(order).exp()) for order in orders]
    assert stats.chisquare(counts, expected).pvalue > 1e-6
    router.eval()
    assert router.route(torch.eye(8).view(1, 8, 8), torch.ones(4, dtype=torch.bool)).experts_BTK[0, 0].tolist() == [
        2,
        0,
    ]


def test_the_surrogate_has_the_mean_loss_for_its_value_and_a_leave_one_out_baseline():
    task = torch.tensor([[1.0, 4.0], [2.0, 4.0], [6.0, 4.0]], requires_grad=True)
    log_prob = torch.tensor([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]], requires_grad=True)
    loss = reinforced(task, log_prob)
    assert loss.tolist() == [3.0, 4.0]
    by_task, by_log_prob = torch.autograd.grad(loss.sum(), [task, log_prob])
    torch.testing.assert_close(by_task, torch.full((3, 2), 1 / 3))
    expected = torch.tensor([[1 - 4.0, 0.0], [2 - 3.5, 0.0], [6 - 1.5, 0.0]]) / 3
    torch.testing.assert_close(by_log_prob, expected)


def tiny():
    """One token, three experts, two of them chosen in order: six outcomes."""
    document = {
        "width": 8,
        "encoder": {"kind": "image-patch", "height": 4, "width": 4, "patch": 4},
        "experts": {"routed": 3, "hidden": 8, "top_k": 2, "balance": 0.0, "router": {"kind": "policy", "rollouts": 3}},
        "head": {"kind": "classification", "classes": 3},
    }
    network = build(ModelConfig.model_validate(document), 2)
    with torch.no_grad():
        network.head.score.weight.mul_(4.0)  # choices must matter
    return network


def test_the_gradient_is_that_of_the_expected_loss_by_enumeration(monkeypatch):
    """The mean of 4,000 estimates, in 100 parts, within 5 of its own standard errors in every coordinate.

    False alarms for a fresh seed: t with 99 degrees of freedom, 2.5e-6 a coordinate, 6e-4 for the 240 of them. This
    seed is fixed.
    """
    network = tiny()
    batch = network.synthetic_batch(1)
    expected_loss = torch.zeros(())
    router = network.blocks[0].moe.router
    for order in itertools.permutations(range(3), 2):
        with monkeypatch.context() as patch:
            patch.setattr(router, "choose", lambda scores, allowed_E, order=order: torch.tensor([[order]]))
            output = network(batch)
        expected_loss = expected_loss + output.routing[0].log_prob_B.exp() * network.task_loss(output, batch)
    watched = [router.score.weight, network.head.score.weight, network.blocks[0].moe.experts.down.weight]
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(expected_loss.sum(), watched)])
    copies = 4000
    many = {name: tensor.expand(copies, *tensor.shape[1:]) for name, tensor in batch.items()}
    loss_B = network.loss(many)
    assert loss_B.mean().item() == pytest.approx(expected_loss.item(), abs=0.05)
    chunks = [
        torch.cat([g.flatten() for g in torch.autograd.grad(part.mean(), watched, retain_graph=True)])
        for part in loss_B.split(40)
    ]
    samples = torch.stack(chunks)
    error = (samples.std(0) / len(samples) ** 0.5).clamp(min=1e-9)
    assert float(((samples.mean(0) - exact).abs() / error).max()) < 5.0
    # Without the surrogate the choices have no gradient of their own, and the estimate is far off.
    outputs = [network(many) for _ in range(3)]
    plain = torch.stack([network.task_loss(o, many) for o in outputs]).mean()
    (blind,) = torch.autograd.grad(plain, [router.score.weight])
    gap = (blind.flatten() - exact[: blind.numel()]).abs() / error[: blind.numel()]
    assert float(gap.max()) > 5.0
