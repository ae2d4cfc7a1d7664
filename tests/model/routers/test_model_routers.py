"""Routing and the per-example balance loss, against loops."""

from __future__ import annotations

import math

import pytest
import torch

from conclave.base.errors import BadInputError
from conclave.model.routers.penalties import example_balance_loss
from conclave.model.routers.softmax import SoftmaxRouter

WIDTH, HELD = 8, 6
MASKS = [
    [True] * HELD,
    [False, True, True, False, True, True],
    [True, False, False, False, False, True],
]


def router_and_tokens(top_k, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    router = SoftmaxRouter(WIDTH, HELD, top_k).to(dtype)
    with torch.no_grad():
        router.score.weight.normal_(generator=generator)
    return router, torch.randn(5, 7, WIDTH, generator=generator, dtype=dtype)


def loop_route(weight, token, allowed, top_k):
    """One token: softmax over the allowed experts, best ``top_k``, renormalised; in Python floats."""
    scores = {e: sum(w * x for w, x in zip(weight[e], token, strict=True)) for e in range(len(weight)) if allowed[e]}
    total = sum(math.exp(s) for s in scores.values())
    prob = {e: math.exp(s) / total for e, s in scores.items()}
    best = sorted(prob, key=prob.get, reverse=True)[:top_k]
    return best, [prob[e] / sum(prob[b] for b in best) for e in best], prob


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_routing_equals_a_loop_over_tokens(top_k, mask):
    router, x = router_and_tokens(top_k)
    routing = router.route(x, torch.tensor(mask))
    assert torch.allclose(routing.weights_BTK.sum(-1), torch.ones(5, 7, dtype=x.dtype), rtol=0, atol=1e-12)
    for b in range(5):
        aux = 0.0
        picked = dict.fromkeys(range(HELD), 0)
        mean = dict.fromkeys(range(HELD), 0.0)
        for t in range(7):
            best, weights, prob = loop_route(router.score.weight.tolist(), x[b, t].tolist(), mask, top_k)
            assert routing.experts_BTK[b, t].tolist() == best
            assert routing.weights_BTK[b, t].tolist() == pytest.approx(weights, abs=1e-12)
            for e in best:
                picked[e] += 1
            for e, p in prob.items():
                mean[e] += p / 7
        for e in range(HELD):
            aux += picked[e] / 7 * mean[e]
        assert routing.aux_B[b].item() == pytest.approx(aux * sum(mask) / top_k, abs=1e-12)


@pytest.mark.parametrize("mask", MASKS[1:])
def test_a_forbidden_expert_is_never_chosen_and_its_row_has_no_gradient(mask):
    router, x = router_and_tokens(2, torch.float32)
    with torch.no_grad():
        router.score.weight[0] += 5.0  # forbidden or not, the favourite of many tokens
    allowed = torch.tensor(mask)
    routing = router.route(x, allowed)
    assert bool(allowed[routing.experts_BTK].all())
    ((routing.weights_BTK * torch.rand(2)).sum() + routing.aux_B.sum()).backward()
    gradient = router.score.weight.grad
    assert bool(gradient.isfinite().all())
    assert not gradient[~allowed].any()
    assert bool(gradient[allowed].abs().sum(dim=1).gt(0).all())


@pytest.mark.parametrize(("mask", "top_k"), [(MASKS[2], 3), ([False] * HELD, 1), (MASKS[0], HELD + 1)])
def test_top_k_beyond_the_allowed_is_bad_input(mask, top_k):
    router, x = router_and_tokens(top_k)
    with pytest.raises(BadInputError, match=f"top_k is {top_k}, must be at most the {sum(mask)} experts present"):
        router.route(x, torch.tensor(mask))


def test_balance_loss_equals_a_double_loop():
    generator = torch.Generator().manual_seed(4)
    prob = torch.rand(4, 5, HELD, generator=generator, dtype=torch.float64).softmax(-1)
    experts = torch.stack([torch.randperm(HELD, generator=generator)[:3] for _ in range(20)]).view(4, 5, 3)
    got = example_balance_loss(prob, experts, HELD)
    for b in range(4):
        expected = 0.0
        for e in range(HELD):
            share = sum(int(e in experts[b, t].tolist()) for t in range(5)) / 5
            expected += share * sum(prob[b, t, e].item() for t in range(5)) / 5
        assert got[b].item() == pytest.approx(expected * HELD / 3, abs=1e-12)


def test_balance_loss_is_one_when_uniform_and_largest_when_collapsed():
    tokens = HELD  # token t goes to experts t and t+1: every expert gets the same share
    experts = torch.tensor([[[t, (t + 1) % HELD] for t in range(tokens)]])
    uniform = torch.full((1, tokens, HELD), 1 / HELD)
    assert example_balance_loss(uniform, experts, HELD).item() == pytest.approx(1.0, abs=1e-6)
    collapsed = torch.zeros(1, tokens, HELD)
    collapsed[..., :2] = 0.5
    only = torch.tensor([[[0, 1]] * tokens])
    assert example_balance_loss(collapsed, only, HELD).item() == pytest.approx(HELD / 2, abs=1e-6)


def test_balance_loss_does_not_couple_examples():
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(3, 5, HELD, generator=generator, dtype=torch.float64, requires_grad=True)
    prob = logits.softmax(-1)
    loss = example_balance_loss(prob, prob.topk(2).indices, HELD)
    for b in range(3):
        (gradient,) = torch.autograd.grad(loss[b], logits, retain_graph=True)
        others = [i for i in range(3) if i != b]
        assert not gradient[others].any()
        assert gradient[b].any()
        alone = example_balance_loss(prob[b : b + 1], prob[b : b + 1].topk(2).indices, HELD)
        assert torch.equal(alone[0], loss[b])


def test_a_forbidden_expert_is_not_chosen_even_where_allowed_probabilities_underflow():
    router = SoftmaxRouter(8, 6, 2)
    with torch.no_grad():
        router.score.weight.zero_()
        router.score.weight[5, 0] = 300.0  # the softmax of every other expert is exactly 0
    x_BTD = torch.zeros(1, 1, 8)
    x_BTD[..., 0] = 1.0
    allowed_E = torch.tensor([False, False, False, False, True, True])
    routing = router.route(x_BTD, allowed_E)
    assert routing.experts_BTK.flatten().tolist() == [5, 4]
    assert routing.weights_BTK.isfinite().all()
