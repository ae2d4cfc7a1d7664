"""Each router against what its docstring says, written as loops over tokens in Python floats."""

from __future__ import annotations

import math

import pytest
import torch

from conclave.model.experts.config import ExpertsConfig
from conclave.model.routers.kinds import make_router
from conclave.model.routers.sigmoid import moved_bias

WIDTH, ROUTED = 8, 6
MASKS = ["111111", "011011", "100001"]
KINDS = {
    "softmax": {"kind": "softmax"},
    "softmax, biased": {"kind": "softmax", "selection_bias": True},
    "sigmoid": {"kind": "sigmoid"},
    "attention": {"kind": "attention", "heads": 2, "key_width": 4},
    "causal attention": {"kind": "attention", "heads": 2, "key_width": 4},
    "attention, biased": {"kind": "attention", "heads": 2, "key_width": 4, "selection_bias": True},
    "learned groups": {"kind": "hierarchical", "groups": 3, "top_groups": 1},
    "learned groups, two": {"kind": "hierarchical", "groups": 3, "top_groups": 2},
    "group-limited": {"kind": "hierarchical", "style": "group-limited", "groups": 3, "top_groups": 1},
    "group-limited, two": {"kind": "hierarchical", "style": "group-limited", "groups": 3, "top_groups": 2},
    "policy": {"kind": "policy"},
    "top-p": {"kind": "top-p", "mass": 0.6},
}


def make(name, held=tuple(range(ROUTED)), top_k=2):
    config = ExpertsConfig.model_validate({"routed": ROUTED, "hidden": 8, "top_k": top_k, "router": KINDS[name]})
    router = (
        make_router(config.router, held, WIDTH, routed=config.routed, top_k=config.top_k, causal="causal" in name)
        .double()
        .eval()
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(generator=generator)
        for buffer in router.buffers():
            buffer.normal_(0.0, 0.3, generator=generator)
    return router, torch.randn(4, 5, WIDTH, generator=generator, dtype=torch.float64)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def softmax(scores):
    total = sum(math.exp(s) for s in scores.values())
    return {e: math.exp(s) / total for e, s in scores.items()}


def linear_scores(router, token, allowed):
    return {e: dot(row, token) for e, row in enumerate(router.score.weight.tolist()) if allowed[e]}


def biased_logits(router, prob):
    bias = [0.0] * ROUTED if router.selection_bias is None else router.selection_bias[:, 0].tolist()
    return {e: math.log(p) + bias[e] for e, p in prob.items()}


def distribution(name, router, tokens, t, allowed):
    """Probability of each allowed expert for token t, and what the choice goes by where that is something else."""
    token = tokens[t]
    if name in ("softmax", "softmax, biased", "policy", "top-p"):
        prob = softmax(linear_scores(router, token, allowed))
        return prob, biased_logits(router, prob), None
    if name.startswith("learned"):
        group_rows, scores = router.common["group"].weight.tolist(), linear_scores(router, token, allowed)
        groups = softmax({g: dot(group_rows[g], token) for g in range(3) if any(e // 2 == g for e in scores)})
        prob = {}
        for g, p in groups.items():
            within = softmax({e: s for e, s in scores.items() if e // 2 == g})
            prob |= {e: p * q for e, q in within.items()}
        return prob, prob, groups
    if "attention" in name:
        seen = tokens[: t + 1] if "causal" in name else tokens
        mean = [sum(column) / len(seen) for column in zip(*seen, strict=True)]
        from_token, from_context = (router.common[part].weight.tolist() for part in ("query", "context"))
        query = [dot(a, token) + dot(b, mean) for a, b in zip(from_token, from_context, strict=True)]
        heads = []
        for h in range(2):
            part = query[4 * h : 4 * h + 4]
            keys = router.key.weight.tolist()
            heads.append(softmax({e: dot(keys[e], part) for e in range(ROUTED) if allowed[e]}))
        prob = {e: sum(head[e] for head in heads) / 2 for e in heads[0]}
        return prob, biased_logits(router, prob), None
    affinity = {e: 1 / (1 + math.exp(-s)) for e, s in linear_scores(router, token, allowed).items()}
    biased = {e: a + router.selection_bias[e, 0].item() for e, a in affinity.items()}
    prob = {e: a / sum(affinity.values()) for e, a in affinity.items()}
    groups = {}
    for g in range(3):
        best = sorted((b for e, b in biased.items() if e // 2 == g), reverse=True)
        if best:
            groups[g] = sum(best[:2])
    return prob, biased, groups if name.startswith("group") else None


def choose(by, groups, top_groups, top_k):
    if groups is not None:
        order, kept = sorted(groups, key=groups.get, reverse=True), []
        for rank, g in enumerate(order):
            if rank < top_groups or len(kept) < top_k:
                kept += [e for e in by if e // 2 == g]
        by = {e: by[e] for e in kept}
    return sorted(by, key=by.get, reverse=True)[:top_k]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", KINDS)
def test_routing_equals_a_loop_over_tokens(name, mask):
    router, x = make(name)
    allowed = [c == "1" for c in mask]
    routing = router.route(x, torch.tensor(allowed))
    for b in range(len(x)):
        tokens, picked, mean, uses = x[b].tolist(), dict.fromkeys(range(ROUTED), 0), dict.fromkeys(range(ROUTED), 0), 0
        for t in range(len(tokens)):
            prob, by, groups = distribution(name, router, tokens, t, allowed)
            best = choose(by, groups, KINDS[name].get("top_groups"), 2)
            assert routing.experts_BTK[b, t].tolist() == best
            if name == "top-p":
                best = best[:1] if prob[best[0]] >= 0.6 else best
            weights = [prob[e] / sum(prob[c] for c in best) for e in best] + [0.0] * (2 - len(best))
            assert routing.weights_BTK[b, t].tolist() == pytest.approx(weights, abs=1e-12)
            uses += len(best)
            for e in best:
                picked[e] += 1 / len(tokens)
            for e, p in prob.items():
                mean[e] += p / len(tokens)
        aux = sum(picked[e] * mean[e] for e in range(ROUTED)) * sum(allowed) / (uses / len(tokens))
        assert routing.aux_B[b].item() == pytest.approx(aux, abs=1e-12)
        assert routing.mean_experts()[b].item() == pytest.approx(uses / len(tokens))


@pytest.mark.parametrize("name", [n for n in KINDS if "groups" in n or "group" in n])
@pytest.mark.parametrize("held", [(1, 2, 3), (0, 5), (2, 3, 4, 5), (0, 2, 4)])
def test_a_holder_of_some_groups_by_global_id_as_one_of_all(name, held):
    """Expert 4 is of the last group wherever it stands; a group nobody holds is skipped, a small one added to."""
    full, x = make(name)
    part, _ = make(name, held)
    state = {n: t if n.startswith("common") else t[list(held)] for n, t in full.state_dict().items()}
    part.load_state_dict(state)
    allowed = torch.tensor([e in held for e in range(ROUTED)])
    a, b = full.route(x, allowed), part.route(x, torch.ones(len(held), dtype=torch.bool))
    assert torch.equal(torch.tensor(held)[b.experts_BTK], a.experts_BTK)
    torch.testing.assert_close(b.weights_BTK, a.weights_BTK)
    torch.testing.assert_close(b.aux_B, a.aux_B)


def test_experts_come_from_the_chosen_groups_only():
    for name in ("learned groups", "group-limited"):
        router, x = make(name)
        chosen = router.route(x, torch.ones(ROUTED, dtype=torch.bool)).experts_BTK // 2
        assert bool((chosen == chosen[..., :1]).all())
        assert len(chosen.unique()) > 1


def test_selection_bias_moves_the_choice_and_never_the_weights():
    router, x = make("sigmoid")
    everyone = torch.ones(ROUTED, dtype=torch.bool)
    router.selection_bias.zero_()
    router.selection_bias[3] = 10.0
    routing = router.route(x, everyone)
    assert bool((routing.experts_BTK[..., 0] == 3).all())
    affinity = router.score(x).sigmoid().gather(-1, routing.experts_BTK)
    torch.testing.assert_close(routing.weights_BTK, affinity / affinity.sum(-1, keepdim=True))
    before = routing.weights_BTK
    router.selection_bias += 1.0  # all alike: nothing changes
    assert torch.equal(router.route(x, everyone).weights_BTK, before)


@pytest.mark.parametrize("name", ["softmax, biased", "attention, biased"])
def test_an_optional_bias_moves_the_choice_and_never_the_weights(name):
    router, x = make(name)
    plain, _ = make(name.removesuffix(", biased"))
    everyone = torch.ones(ROUTED, dtype=torch.bool)
    router.selection_bias.zero_()
    assert torch.equal(router.route(x, everyone).experts_BTK, plain.route(x, everyone).experts_BTK)
    router.selection_bias[3] = 50.0
    routing = router.route(x, everyone)
    assert bool((routing.experts_BTK[..., 0] == 3).all())
    prob = plain.score_experts(x, everyone).logits_BTE.softmax(-1).gather(-1, routing.experts_BTK)
    torch.testing.assert_close(routing.weights_BTK, prob / prob.sum(-1, keepdim=True))
    assert plain.selection_bias is None
    assert "selection_bias" not in plain.state_dict()


@pytest.mark.parametrize("name", ["sigmoid", "softmax, biased", "attention, biased"])
def test_a_forbidden_expert_does_not_win_by_its_bias(name):
    router, x = make(name)
    allowed = torch.tensor([True, True, False, False, False, True])
    router.selection_bias.fill_(1e6)
    router.selection_bias[allowed] = -3.0  # every allowed affinity plus bias is below 0
    assert bool(allowed[router.route(x, allowed).experts_BTK].all())


def test_moved_bias_goes_against_the_load_by_one_rate():
    bias, load = torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([10, 30, 20, 20])
    torch.testing.assert_close(moved_bias(bias, load, 0.1), torch.tensor([0.6, -1.1, 0.0, 2.0]))
    assert bias.tolist() == [0.5, -1.0, 0.0, 2.0]


@pytest.mark.parametrize(
    ("mass", "counts"), [(0.4, [1, 1]), (0.6, [2, 1]), (0.79, [2, 1]), (0.95, [3, 2]), (1.0, [3, 3])]
)
def test_top_p_takes_the_fewest_experts_that_reach_the_mass(mass, counts):
    config = ExpertsConfig.model_validate(
        {"routed": 4, "hidden": 8, "top_k": 3, "router": {"kind": "top-p", "mass": mass}}
    )
    router = make_router(config.router, range(4), 8, routed=config.routed, top_k=config.top_k, causal=False).double()
    prob = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.85, 0.12, 0.02, 0.01]], dtype=torch.float64)
    with torch.no_grad():
        router.score.weight.zero_()
        router.score.weight[:, :2] = prob.log().T
    x = torch.eye(8, dtype=torch.float64)[:2].view(1, 2, 8)
    routing = router.route(x, torch.ones(4, dtype=torch.bool))
    assert routing.used_BTK.sum(-1)[0].tolist() == counts
    assert routing.mean_experts().tolist() == [sum(counts) / 2]
    assert routing.load(4).tolist() == [sum(c > rank for c in counts) for rank in range(4)]
    assert not routing.weights_BTK[~routing.used_BTK].any()
    for t, count in enumerate(counts):
        used = prob[t, :count] / prob[t, :count].sum()
        torch.testing.assert_close(routing.weights_BTK[0, t, :count], used)
