"""What all routers promise: forbidden experts, isolation of examples, no state, finite gradients."""

from __future__ import annotations

import pytest
import torch
from router_samples import ROUTERS, batch_for, router_config, router_text_config

from conclave.base.errors import BadInputError
from conclave.model import parameters
from conclave.model.building import build, from_state
from conclave.model.experts.config import ExpertsConfig
from conclave.model.layers.unit_random import drawing_from, unit_uniform
from conclave.model.network import Network
from conclave.model.routers.attention import context
from conclave.model.routers.kinds import make_router
from conclave.model.routers.routing import gumbel_like

KINDS = pytest.mark.parametrize("name", ROUTERS)


def make(name, top_k=2, **options):
    config = ExpertsConfig.model_validate({"routed": 6, "hidden": 8, "top_k": top_k, "router": ROUTERS[name] | options})
    router = make_router(config.router, range(6), 8, routed=config.routed, top_k=config.top_k, causal=False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(generator=generator)
    return router, torch.randn(4, 5, 8, generator=generator)


def draws_by(example_B):
    """Draws that are a function of example and layer, as in private training."""
    layer = iter(range(100))

    def draw(examples, values):
        number = next(layer)
        assert examples == len(example_B)
        rows = [
            torch.rand(values, generator=torch.Generator().manual_seed(1000 * number + int(e)), dtype=torch.float64)
            for e in example_B
        ]
        return torch.stack(rows)

    return drawing_from(draw)


def total(routing):
    """Everything that a training loss may take from a routing, [B]."""
    loss_B = (routing.weights_BTK * torch.tensor([1.0, -0.5])).sum((1, 2)) + routing.aux_B
    for term in (routing.penalty_B, routing.log_prob_B):
        loss_B = loss_B if term is None else loss_B + term
    return loss_B


@KINDS
@pytest.mark.parametrize("mask", ["111111", "011011", "100001", "000011"])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_a_forbidden_expert_is_never_chosen_and_its_rows_have_no_gradient(name, mask, scale):
    """At scale 300 probabilities underflow to 0, and affinities to 0 or 1."""
    router, x = make(name)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.mul_(scale)
    allowed = torch.tensor([c == "1" for c in mask])
    routing = router.route(x, allowed)
    assert bool(allowed[routing.experts_BTK].all())
    assert all(len(set(row)) == 2 for row in routing.experts_BTK.flatten(0, 1).tolist())
    torch.testing.assert_close(routing.weights_BTK.sum(-1), torch.ones(4, 5))
    loss_B = total(routing)
    assert bool(loss_B.isfinite().all())
    loss_B.sum().backward()
    for parameter_name, parameter in router.named_parameters():
        assert bool(parameter.grad.isfinite().all()), parameter_name
        if not parameter_name.startswith("common"):
            assert not parameter.grad[~allowed].any()
    if scale == 1.0:
        assert any(p.grad.any() for p in router.parameters())


@KINDS
def test_top_k_beyond_the_allowed_is_bad_input(name):
    router, x = make(name)
    with pytest.raises(BadInputError, match="top_k is 2, must be at most the 1 experts present"):
        router.route(x, torch.tensor([False, True, False, False, False, False]))


@KINDS
def test_routing_and_gradient_of_an_example_do_not_depend_on_the_others(name):
    router, x = make(name)
    everyone = torch.ones(6, dtype=torch.bool)

    def of_example_two(x, example_B, place):
        with draws_by(example_B):
            routing = router.route(x, everyone)
        gradients = torch.autograd.grad(total(routing)[place], list(router.parameters()), allow_unused=True)
        return routing.experts_BTK[place], total(routing)[place], gradients

    experts, loss, gradients = of_example_two(x, [0, 1, 2, 3], 2)
    other = torch.randn(6, 5, 8) * 50.0
    companies = {
        "alone": (x[2:3], [2], 0),
        "added": (torch.cat([x, other]), [0, 1, 2, 3, 10, 11, 12, 13, 14, 15], 2),
        "replaced": (torch.cat([other[:3], x[2:3], other[3:]]), [7, 8, 9, 2, 4, 5, 6], 3),
        "copies": (x[[2, 2, 2]], [2, 2, 2], 1),
    }
    for company, arguments in companies.items():
        other_experts, other_loss, other_gradients = of_example_two(*arguments)
        assert torch.equal(other_experts, experts), company
        torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=1e-5)
        for a, b in zip(other_gradients, gradients, strict=True):
            if b is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make_config", [router_config, router_text_config])
@KINDS
@pytest.mark.parametrize("training", [True, False])
def test_forward_and_backward_change_no_state(name, make_config, training):
    config = make_config(name)
    network, batch = build(config, 1).train(training), batch_for(config)
    before = {n: t.clone() for n, t in network.state_dict().items()}
    assert all(bool(t.isfinite().all()) for t in before.values())
    loss_B = network.loss(batch)
    assert loss_B.shape == (5,)
    loss_B.sum().backward()
    assert all(torch.equal(t, before[n]) for n, t in network.state_dict().items())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters())
    if not training:
        assert torch.equal(network.loss(batch), loss_B)


@KINDS
def test_evaluation_draws_nothing_and_exploration_draws_for_each_example(name):
    router, x = make(name)
    everyone = torch.ones(6, dtype=torch.bool)

    def drawn(training):
        calls = []
        router.train(training)
        with drawing_from(lambda examples, values: calls.append((examples, values)) or torch.rand(examples, values)):
            router.route(x, everyone)
        return calls

    assert drawn(training=False) == []
    samples = ROUTERS[name].get("noise") or ROUTERS[name]["kind"] == "policy"
    assert [examples for examples, _ in drawn(training=True)] == [4] * (
        0 if not samples else 2 if name == "learned groups" else 1
    )


@pytest.mark.parametrize("make_config", [router_config, router_text_config])
@KINDS
def test_names_on_the_wire_and_back(name, make_config):
    config = make_config(name)
    full = build(config, 1)
    wire = parameters.split(full.state_dict(), full.held)
    assert parameters.shapes(config, full.held) == {n: t.shape for n, t in wire.items()}
    assert not [n for n in wire if n.startswith("router/") and ".common." in n]
    commons = [n for n in wire if ".moe.router.common." in n]
    assert all(n.startswith("shared/") for n in commons)
    assert bool(commons) == (name in ("attention", "learned groups"))
    if name in ("sigmoid", "group-limited"):
        assert wire["router/0/3/selection_bias"].tolist() == [0.0]
    back = parameters.join(wire, full.held)
    assert back.keys() == full.state_dict().keys()
    assert all(torch.equal(back[n], t) for n, t in full.state_dict().items())


@KINDS
@pytest.mark.parametrize("held", [(1, 3, 4), (0, 5), (2, 3), (0, 1, 2, 3, 4, 5)])
def test_holding_a_subset_equals_masking_the_full_model(name, held):
    config = router_config(name)
    full, batch = build(config, 1).eval(), batch_for(config, 9)
    with torch.no_grad():
        for buffer in full.buffers():
            buffer.copy_(torch.linspace(-0.2, 0.2, 6).unsqueeze(1))
    wire = parameters.split(full.state_dict(), full.held)
    chosen = {n: wire[n] for n in parameters.select(wire, {0: held})}
    part = from_state(config, {0: held}, parameters.join(chosen, {0: held})).eval()
    assert set(parameters.split(part.state_dict(), {0: held})) == set(chosen)
    a, b = part(batch), full(batch, allowed={0: torch.tensor([e in held for e in range(6)])})
    torch.testing.assert_close(a.scores, b.scores, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.aux_B, b.aux_B, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.tensor(held)[a.routing[0].experts_BTK], b.routing[0].experts_BTK)


def test_every_parameter_is_initialised_with_the_routers_gain():
    for name in ROUTERS:
        config = router_config(name).model_copy(
            update={"init": router_config(name).init.model_copy(update={"router": 0.0})}
        )
        router = build(config, 1).blocks[0].moe.router
        assert not any(t.any() for t in router.state_dict().values())  # NaN would count as True


@pytest.mark.parametrize("name", ["attention", "softmax"])
def test_a_token_of_text_learns_nothing_from_later_ones(name):
    config = router_text_config(name)
    network = build(config, 1).eval()
    batch = batch_for(config, 3)
    changed = {"text": batch["text"].clone()}
    changed["text"][:, 7:] = 65
    a, b = network(batch), network(changed)
    torch.testing.assert_close(a.scores[:, :7], b.scores[:, :7])
    assert torch.equal(a.routing[1].experts_BTK[:, :7], b.routing[1].experts_BTK[:, :7])


def test_context_of_attention_is_the_mean_of_what_may_be_seen():
    x = torch.arange(12.0).view(2, 3, 2)
    assert context(x, causal=False)[1].tolist() == [[8.0, 9.0]]
    assert context(x, causal=True)[1].tolist() == [[6.0, 7.0], [7.0, 8.0], [8.0, 9.0]]
    assert [Network(c, c.all_experts).blocks[0].moe.router.causal for c in map_configs()] == [False, True]


def map_configs():
    return [router_config("attention"), router_text_config("attention")]


def test_rows_of_unused_slots_are_not_computed():
    config = router_config("top-p", shared=0)
    layer = build(config, 1).eval().blocks[0].moe
    seen = []
    layer.experts.up.register_forward_pre_hook(lambda _, args: seen.append(args))
    x = torch.randn(5, 4, 16)
    x[:, :, 0] = torch.arange(5.0).unsqueeze(1)
    y, routing = layer(x, torch.ones(6, dtype=torch.bool))
    rows, offsets, example, examples = seen[0]
    used = int(routing.used_BTK.sum())
    assert 20 <= used < 40
    assert (len(rows), int(offsets[-1]), len(example), len(examples)) == (used, used, used, 5)
    assert example.tolist() == [int(row[0]) for row in rows]
    assert offsets.tolist() == routing.load(6).cumsum(0).tolist()
    for b in range(5):
        for t in range(4):
            expected = torch.zeros(16)
            for k in range(2):
                if routing.used_BTK[b, t, k]:
                    e = int(routing.experts_BTK[b, t, k])
                    hidden = torch.nn.functional.gelu(x[b, t] @ layer.experts.up.weight[e])
                    expected = expected + routing.weights_BTK[b, t, k] * (hidden @ layer.experts.down.weight[e])
            torch.testing.assert_close(y[b, t], expected, rtol=1e-4, atol=1e-5)


def test_gumbel_noise_is_finite_whatever_is_drawn():
    scores = torch.zeros(2, 3, 4)
    for edge in (0.0, 2.0**-53, 1.0 - 2.0**-53):
        with drawing_from(
            lambda examples, values, edge=edge: torch.full((examples, values), edge, dtype=torch.float64)
        ):
            assert unit_uniform(scores).shape == (2, 12)
            assert bool(gumbel_like(scores).isfinite().all())
