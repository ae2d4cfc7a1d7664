"""Balance losses, z-loss and entropy: closed forms, minima, and gradients where others vanish."""

from __future__ import annotations

import math

import pytest
import torch

from conclave.model.routers.penalties import entropy, example_balance_loss, uniform_balance_loss, z_loss

EVERYONE = torch.ones(6, dtype=torch.bool)
SOME = torch.tensor([True, False, True, True, False, True])


def logits(examples=3, tokens=4, allowed=EVERYONE):
    generator = torch.Generator().manual_seed(5)
    free = torch.randn(examples, tokens, 6, generator=generator, dtype=torch.float64)
    return free.masked_fill(~allowed, float("-inf"))


@pytest.mark.parametrize("allowed", [EVERYONE, SOME])
def test_all_three_equal_loops(allowed):
    x = logits(allowed=allowed)
    ids = [e for e in range(6) if allowed[e]]
    for b in range(3):
        mean, z, h = dict.fromkeys(ids, 0.0), 0.0, 0.0
        for t in range(4):
            total = sum(math.exp(x[b, t, e]) for e in ids)
            for e in ids:
                p = math.exp(x[b, t, e]) / total
                mean[e] += p / 4
                h -= p * math.log(p) / 4
            z += math.log(total) ** 2 / 4
        kl = sum(math.log(1 / len(ids) / p) for p in mean.values()) / len(ids)
        assert uniform_balance_loss(x, allowed)[b].item() == pytest.approx(kl, abs=1e-12)
        assert z_loss(x)[b].item() == pytest.approx(z, abs=1e-12)
        assert entropy(x, allowed)[b].item() == pytest.approx(h, abs=1e-12)


def test_the_minimum_of_the_uniform_loss_is_the_uniform_distribution_alone():
    free = torch.zeros(1, 1, 6, dtype=torch.float64, requires_grad=True)
    loss = uniform_balance_loss(free, EVERYONE)
    (gradient,) = torch.autograd.grad(loss.sum(), free, create_graph=True)
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    assert gradient.abs().max() < 1e-12
    hessian = torch.stack(
        [torch.autograd.grad(gradient.flatten()[i], free, retain_graph=True)[0].flatten() for i in range(6)]
    )
    values = torch.linalg.eigvalsh(hessian)
    assert values[0].abs() < 1e-12  # adding a constant to all logits changes nothing
    torch.testing.assert_close(values[1:], torch.full((5,), 1 / 6, dtype=torch.float64))  # everything else costs
    assert bool((uniform_balance_loss(logits(tokens=1), EVERYONE) > 0).all())


def test_its_gradient_is_largest_where_the_others_vanish():
    """A collapsed router: all the probability on one expert, in float32, underflow included."""
    for height in (30.0, 300.0):
        free = torch.zeros(1, 1, 6)
        free[..., 0] = height
        free.requires_grad_()
        (collapsed,) = torch.autograd.grad(uniform_balance_loss(free, EVERYONE).sum(), free)
        expected = torch.tensor([5 / 6] + [-1 / 6] * 5)
        torch.testing.assert_close(collapsed.flatten(), expected)
        sequence = example_balance_loss(free.softmax(-1), free.topk(1).indices, 6)
        (vanished,) = torch.autograd.grad(sequence.sum(), free)
        assert vanished.abs().max() < 1e-10


def test_gradients_of_single_tokens_add_up_to_the_imbalance_of_the_batch():
    x = logits(examples=50, tokens=1).requires_grad_()
    offset = torch.zeros(6, dtype=torch.float64, requires_grad=True)  # what all examples' logits have in common
    (gradient,) = torch.autograd.grad(uniform_balance_loss(x + offset, EVERYONE).sum(), offset)
    torch.testing.assert_close(gradient, x.softmax(-1).sum((0, 1)) - 50 / 6)


@pytest.mark.parametrize(("kind", "spreads"), [("uniform", True), ("sequence", False)])
def test_a_collapsed_router_of_single_tokens_recovers_by_the_uniform_loss_only(kind, spreads):
    """Eight clusters of tokens with a common part that expert 0 is in love with; nothing but the balance loss."""
    generator = torch.Generator().manual_seed(0)
    x = torch.eye(9)[torch.randint(8, (256,), generator=generator)].unsqueeze(1)
    x[..., 8] = 1.0
    weight = torch.randn(8, 9, generator=generator) * 3
    weight[0, 8] = 30.0
    weight.requires_grad_()
    everyone = torch.ones(8, dtype=torch.bool)

    def imbalance():
        load = torch.bincount((x @ weight.T).argmax(-1).flatten(), minlength=8)
        return float(load.max() / load.double().mean())

    assert imbalance() == 8.0
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for _ in range(100):
        scores = x @ weight.T
        if kind == "uniform":
            loss_B = uniform_balance_loss(scores, everyone)
        else:
            loss_B = example_balance_loss(scores.softmax(-1), scores.topk(2).indices, 8)
        optimizer.zero_grad()
        loss_B.mean().backward()
        optimizer.step()
    assert (imbalance() <= 3.0) == spreads


def test_no_penalty_couples_examples():
    x = logits().requires_grad_()
    for loss_B in (uniform_balance_loss(x, EVERYONE), z_loss(x), entropy(x, EVERYONE)):
        (gradient,) = torch.autograd.grad(loss_B[1], x)
        assert gradient[1].any()
        assert not gradient[[0, 2]].any()
