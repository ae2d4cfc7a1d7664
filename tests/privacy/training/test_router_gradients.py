"""Networks with every router under differential privacy: per-unit gradients, and the model audit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from microbatches import relative_error
from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping
from router_samples import ROUTERS, batch_for, router_config, router_text_config

from conclave.base.errors import BadInputError
from conclave.model.building import build
from conclave.model.experts.stacked import GroupedLinear
from conclave.model.layers.unit_random import drawing_from
from conclave.privacy.audit.model import audit_model
from conclave.privacy.audit.subject import Subject
from conclave.privacy.bookkeeping import Bookkeeper, Units
from conclave.privacy.bookkeeping.contributions import Experts, merge
from conclave.privacy.bookkeeping.ragged import Segments
from conclave.privacy.gradients.unit_index import UnitIndex
from conclave.privacy.randomness import derive, per_unit_uniform
from conclave.privacy.training.dpsgd_mechanism import DpSgd
from conclave.privacy.training.private_training import PrivateTraining

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

MECHANISM = DpSgd(steps=1, learning_rate=1.0, sampling_rate=0.5, clip=0.5, noise_multiplier=1.0, declared_size=100)
QUICK = replace(MECHANISM, physical_batch=32)
KINDS = pytest.mark.parametrize("name", ROUTERS)
MODELS = pytest.mark.parametrize("make_config", [router_config, router_text_config])


def loss_with_draws(network, batch, example_B):
    """The loss with draws that follow the example, as private training makes them."""
    layer = iter(range(1000))

    def draw(examples, values):
        assert examples == len(example_B)
        return per_unit_uniform(derive(bytes(32), next(layer)), 0, example_B, values)

    with drawing_from(draw):
        return network.loss(batch)


def microbatches(network, batch, unit_B):
    """Gradient of every unit's summed loss, run alone through plain autograd."""
    everyone, truth = torch.arange(len(unit_B)), []
    for unit in range(int(unit_B.max()) + 1):
        mine = {n: t[unit_B == unit] for n, t in batch.items()}
        loss = loss_with_draws(network, mine, everyone[unit_B == unit]).sum()
        truth.append(torch.autograd.grad(loss, list(network.parameters())))
    return {p: torch.stack(rows) for p, rows in zip(network.parameters(), zip(*truth, strict=True), strict=True)}


@MODELS
@KINDS
@pytest.mark.parametrize("unit", [[0, 1, 2, 3, 4], [0, 0, 1, 2, 2]])
def test_bookkeeping_equals_microbatches(name, make_config, unit):
    config = make_config(name)
    network, batch, unit_B = build(config, 3), batch_for(config), torch.tensor(unit)
    truth = microbatches(network, batch, unit_B)
    bookkeeper = Bookkeeper(network)
    assert bookkeeper.fallbacks == []
    units = Units.one_each(5) if len(unit_B.unique()) == 5 else Units(5, 3, unit_B)
    found = bookkeeper.gradients(lambda: loss_with_draws(network, batch, torch.arange(5)), units)
    bookkeeper.close()
    gradients = found.per_unit()
    for place, p in enumerate(found.reached):
        assert relative_error(gradients[p], truth[p]) < 1e-5
        norm_U = truth[p].flatten(1).double().norm(dim=1)  # of the same gradient, rounded otherwise on the way
        bound_U = found.squared_bound_PU[place].sqrt()
        assert bool((bound_U >= norm_U * (1 - 1e-5)).all())
        assert bool((bound_U <= norm_U * 1.01 + 1e-2).all())
    factor_U = torch.linspace(0.5, 1.5, units.count, dtype=torch.float64)
    for p, total in found.weighted_sums(factor_U).items():
        expected = torch.einsum("u,u...->...", factor_U, truth[p].double())
        assert relative_error(total, expected) < 1e-5
    assert set(found.reached) == set(network.parameters())


@MODELS
@KINDS
def test_hooks_equal_microbatches(name, make_config):
    config = make_config(name)
    network, batch = build(config, 3), batch_for(config)
    truth = microbatches(network, batch, torch.arange(5))
    hooks = GradSampleHooks(network, loss_reduction="sum")
    loss_with_draws(network, batch, torch.arange(5)).sum().backward()
    for p in network.parameters():
        found = p.grad_sample if isinstance(p.grad_sample, torch.Tensor) else torch.stack(p.grad_sample).sum(0)
        assert relative_error(found, truth[p]) < 1e-5
    hooks.cleanup()


@MODELS
@pytest.mark.parametrize("name", [n for n in ROUTERS if n != "policy"])
def test_ghost_norms_equal_microbatches(name, make_config):
    config = make_config(name)
    network, batch = build(config, 3), batch_for(config)
    truth = microbatches(network, batch, torch.arange(5))
    hooks = GradSampleHooksFastGradientClipping(network, loss_reduction="sum")
    loss_with_draws(network, batch, torch.arange(5)).sum().backward()
    for p in network.parameters():
        assert relative_error(p._norm_sample, truth[p].flatten(1).norm(dim=1)) < 1e-4
    hooks.cleanup()


def test_ghost_refuses_a_policy_with_what_to_use_instead():
    network = build(router_config("policy"), 3)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    mechanism = replace(MECHANISM, gradients="ghost", sampling_rate=1.0)
    with (
        PrivateTraining(network, optimizer, network.loss, mechanism, bytes(32)) as training,
        pytest.raises(BadInputError, match="used several times, as by a policy router; use 'bookkeeping'"),
    ):
        training.step(batch_for(network.config))


def test_several_uses_of_experts_are_one_gradient():
    """Two uses that cancel: their norms do not add up, and a norm of each would clip what is not there."""
    generator = torch.Generator().manual_seed(0)
    x, delta = torch.randn(6, 8, generator=generator), torch.randn(6, 16, generator=generator)
    layer = GroupedLinear(3, 8, 16)

    def use(order, sign):
        unit_N = torch.tensor([0, 1, 0, 0, 1, 1])[order]
        return Experts(x[order], sign * delta[order], Segments(torch.tensor([2, 2, 6], dtype=torch.int32), unit_N, 2))

    forward, backward = torch.arange(6), torch.tensor([1, 0, 5, 4, 3, 2])
    both = merge([use(forward, 1.0), use(backward, 2.0)])
    single = use(forward, 1.0).per_unit()
    torch.testing.assert_close(both.per_unit(), 3 * single)
    assert both.per_unit().shape == (2, *layer.weight.shape)
    cancelled = merge([use(forward, 1.0), use(backward, -1.0)])
    assert cancelled.per_unit().abs().max() < 1e-6
    assert isinstance(cancelled, Experts)


@MODELS
@KINDS
def test_a_step_repeats_and_a_units_draws_do_not_depend_on_company(name, make_config):
    """The sum over all units is the sum of what each contributes alone, with the draws of secret, step and unit."""
    config = make_config(name)
    network, batch = build(config, 3), batch_for(config)
    subject = Subject(network, network.loss, batch, replace(MECHANISM, clip=1e6))
    together = subject.sums(torch.arange(5))
    apart = torch.stack([subject.sums(torch.tensor([i])) for i in range(5)]).sum(0)
    assert float((together - apart).norm() / apart.norm()) < 1e-5
    assert torch.equal(subject.sums(torch.arange(5)), together)


def audited(kinds_always, options):
    """Every kind with these options: audits take seconds, so some run by `make soak` only."""
    return [
        pytest.param(kind, options, marks=() if kind in kinds_always else pytest.mark.slow, id=f"{kind}-{options}")
        for kind in ROUTERS
    ]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *audited({"softmax", "sigmoid", "attention", "learned groups"}, {}),
        *audited({"policy"}, {"gradients": "hooks"}),
        *audited({"group-limited"}, {"numeric": "strict"}),
    ],
)
def test_the_model_audit_passes(name, options):
    network = build(router_config(name), 3)
    findings = audit_model(Subject(network, network.loss, batch_for(network.config, 6), replace(QUICK, **options)))
    assert len(findings) == 9
    assert [(f.check, f.violation) for f in findings if f.violation] == []


@pytest.mark.parametrize(("name", "options"), audited({"top-p"}, {}))
def test_the_model_audit_passes_on_text(name, options):
    network = build(router_text_config(name), 3)
    findings = audit_model(Subject(network, network.loss, batch_for(network.config, 4), replace(QUICK, **options)))
    assert [(f.check, f.violation) for f in findings if f.violation] == []


def test_what_no_training_changes_is_returned_unchanged():
    """The selection bias is a buffer: noise is for what training changes, and this stays to the bit."""
    network = build(router_config("sigmoid"), 3)
    before = network.blocks[0].moe.router.selection_bias.clone()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with PrivateTraining(network, optimizer, network.loss, MECHANISM, bytes(32)) as training:
        training.step(batch_for(network.config), UnitIndex(5))
    assert torch.equal(network.blocks[0].moe.router.selection_bias, before)
