"""The public API for plain torch models, and the optimizers behind it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from conclave.base.errors import BadInputError
from conclave.privacy.accounting.accountants import epsilon_by_accountant
from conclave.privacy.accounting.mechanisms import SampledGaussian
from conclave.privacy.gradients.clipping import AdaptiveClip, unit_factors
from conclave.privacy.training.local_optimizers import AdamConfig, NoiseCorrectedAdam, SgdConfig, make_optimizer
from conclave.privacy.training.make_private import make_private

GOOD = {"noise_multiplier": 1.0, "sampling_rate": 0.05, "clip": 1.0, "declared_size": 2000}


def problem(examples=2000):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(examples, 10, generator=generator)
    y = (x @ torch.randn(10, generator=generator) > 0).long()
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 2))

    def loss(batch):
        return nn.functional.cross_entropy(module(batch["x"]), batch["y"], reduction="none")

    return module, loss, {"x": x, "y": y}


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.5), lambda p: torch.optim.Adam(p, lr=0.02)]
)
def test_a_plain_model_learns_privately_with_any_torch_optimizer(make):
    module, loss, records = problem()
    with make_private(module, make(module.parameters()), loss, **GOOD, simulation_secret=bytes(32)) as training:
        assert training.epsilon(1e-5) == {"rdp": 0.0, "pld": 0.0, "prv": 0.0}
        for _ in range(60):
            training.step(records)
        spent = training.epsilon(1e-5)
    charge = SampledGaussian(sampling_rate=0.05, noise_multiplier=1.0, steps=60)
    assert spent == epsilon_by_accountant([charge], 1e-5)
    assert 0.5 < spent["pld"] < spent["rdp"] < 5
    accuracy = float((module(records["x"]).argmax(1) == records["y"]).float().mean())
    assert accuracy > 0.9
    assert not any(layer._forward_hooks for layer in module.modules())


def test_randomness_is_the_systems_unless_a_secret_is_given():
    weights = []
    for secret in (None, None, bytes(32), bytes(32)):
        module, loss, records = problem(50)
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        with make_private(module, optimizer, loss, **GOOD, simulation_secret=secret) as training:
            training.step(records)
        weights.append(module[0].weight.detach().clone())
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[2], weights[3])


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"noise_multiplier": 0.0}, "noise_multiplier is 0.0, must be above 0"),
        ({"sampling_rate": 1.5}, "sampling_rate is 1.5, must be above 0 and at most 1"),
        ({"clip": 9e-13}, "clip is 9e-13, must be at least 1e-12"),
        ({"declared_size": 0}, "declared_size is 0, must be at least 1"),
        ({"simulation_secret": b"short"}, "simulation_secret has 5 bytes, must have 32"),
        ({"simulation_secret": "0" * 32}, "simulation_secret is a str, must be bytes"),
        ({"cliping": "flat"}, "cliping is no option, must be one of"),
        ({"noise_multiplier": math.inf}, "noise_multiplier is inf, must be above 0 and at most"),
        ({"noise_multiplier": math.nan}, "noise_multiplier is nan, must be above 0 and at most"),
        ({"noise_multiplier": None}, "noise_multiplier is None, must be above 0 and at most"),
        ({"noise_multiplier": "1"}, "noise_multiplier is '1', must be above 0 and at most"),
        ({"sampling_rate": True}, "sampling_rate is True, must be above 0 and at most 1"),
        ({"clip": math.inf}, "clip is inf, must be at least 1e-12 and at most"),
        ({"declared_size": math.inf}, "declared_size is inf, must be at least 1 and at most 1e.12, a whole number"),
        ({"declared_size": 20.5}, "declared_size is 20.5, must be at least 1"),
        ({"physical_batch": 0}, "physical_batch is 0, must be at least 1 .* None or a whole number"),
        ({"physical_batch": True}, "physical_batch is True, must be at least 1"),
        ({"records_per_unit": -1}, "records_per_unit is -1, must be at least 1"),
        ({"memory_bytes": "1 GiB"}, "memory_bytes is '1 GiB', must be at least 1"),
        ({"numeric": "Strict"}, "numeric is 'Strict', must be 'fast' or 'strict'"),
        ({"numeric": ["strict"]}, r"numeric is \['strict'\], must be 'fast' or 'strict'"),
        ({"clipping": "per_layer"}, "clipping is 'per_layer', must be 'flat', 'per-layer', 'automatic' or 'adaptive'"),
        ({"gradients": "opacus"}, "gradients is 'opacus', must be 'bookkeeping', 'hooks' or 'ghost'"),
        ({"gradients": "strict"}, "gradients is 'strict', must be"),
        ({"adaptive": 0.5}, "adaptive is 0.5, must be a conclave.privacy.gradients.clipping.AdaptiveClip"),
        ({"gradients": "ghost", "clipping": "per-layer"}, "'ghost' knows records as units"),
    ],
)
def test_bad_values_are_one_sentence(wrong, sentence):
    module, loss, _ = problem(4)
    with pytest.raises(BadInputError, match=sentence):
        make_private(module, torch.optim.SGD(module.parameters(), lr=1.0), loss, **(GOOD | wrong))


def test_a_rule_for_the_clip_bound_has_its_ranges():
    for wrong in ({"quantile": 1.5}, {"rate": math.nan}, {"lowest": 0.0}, {"rate": "fast"}):
        with pytest.raises(BadInputError, match=f"{next(iter(wrong))} is .*, must be at least"):
            AdaptiveClip(**wrong)
    with pytest.raises(BadInputError, match="clipping is 'per_layer', must be"):
        unit_factors(torch.ones(1, 1, dtype=torch.float64), "per_layer", 1.0, 1)


def test_what_is_no_module_optimizer_or_loss_is_named():
    module, loss, _ = problem(4)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    for given, sentence in (
        ((loss, optimizer, loss), "module is a function, must be a torch module"),
        ((module, "sgd", loss), "optimizer is a str, must be a torch optimizer"),
        ((module, optimizer, 3), "example_loss is a int, must be a function of a batch"),
    ):
        with pytest.raises(BadInputError, match=sentence):
            make_private(*given, **GOOD)
    with pytest.raises(BadInputError, match="the module has no trained parameter"):
        make_private(nn.ReLU(), optimizer, loss, **GOOD)


def test_an_optimizer_that_holds_anothers_parameters_is_refused():
    module, loss, _ = problem(4)
    optimizer = torch.optim.SGD([*module.parameters(), nn.Parameter(torch.ones(3))], lr=1.0)
    with pytest.raises(BadInputError, match="a parameter that is not the module's: it would get noise alone"):
        make_private(module, optimizer, loss, **GOOD)


@pytest.mark.parametrize("delta", [0.0, 1.0, math.nan, "1e-5"])
def test_a_delta_out_of_range_is_refused(delta):
    module, loss, _ = problem(4)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    with make_private(module, optimizer, loss, **GOOD) as training, pytest.raises(BadInputError, match="delta is "):
        training.epsilon(delta)


def test_a_trained_parameter_that_the_optimizer_lacks_is_refused():
    module, loss, _ = problem(4)
    with pytest.raises(BadInputError, match=r"parameter 0\.weight is trained but not in the optimizer"):
        make_private(module, torch.optim.SGD(module[2].parameters(), lr=1.0), loss, **GOOD)


def test_layers_without_a_rule_are_named():
    module = nn.Sequential(nn.Conv3d(1, 2, 2), nn.Flatten(), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    with make_private(module, optimizer, lambda batch: module(batch["x"]).square().sum(1), **GOOD) as training:
        assert training.fallbacks == ["0 (Conv3d)"]


def test_without_noise_the_corrected_adam_is_adam():
    parameters = [nn.Parameter(torch.randn(5, 3)) for _ in range(2)]
    parameters[1].data.copy_(parameters[0].data)
    ours = NoiseCorrectedAdam([parameters[0]], lr=0.01, floor=1e-12)
    theirs = torch.optim.Adam([parameters[1]], lr=0.01, eps=0.0)
    for _ in range(20):
        gradient = torch.randn(5, 3)
        for p in parameters:
            p.grad = gradient.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(parameters[0], parameters[1], rtol=1e-5, atol=1e-6)


def test_the_correction_takes_the_noise_out_of_the_second_moment():
    """Gradient 1 with noise of variance 9: plain Adam sees a second moment of 10, the corrected one of 1."""
    parameter = nn.Parameter(torch.zeros(2_000))
    optimizer = NoiseCorrectedAdam([parameter], lr=1.0, betas=(0.0, 0.999), floor=0.1)
    generator = torch.Generator().manual_seed(2)
    for _ in range(1500):
        parameter.grad = 1.0 + 3.0 * torch.randn(2_000, generator=generator)
        optimizer.param_groups[0]["noise_variance"] = 9.0
        before = parameter.detach().clone()
        optimizer.step()
    scale = (before - parameter.detach()) / parameter.grad
    assert float(scale.median()) == pytest.approx(1.0, rel=0.05)  # 1/√(10 − 9); plain Adam would give 0.316


def test_the_configured_optimizer_scales_rates_by_name():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for config in (SgdConfig(momentum=0.5), AdamConfig()):
        optimizer = make_optimizer(module, config, 0.2, {"1.weight": 0.25})
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert rates[id(module[1].weight)] == pytest.approx(0.05)
        assert rates[id(module[0].weight)] == pytest.approx(0.2)
        assert len(rates) == 4
    assert math.isclose(make_optimizer(module, SgdConfig(momentum=0.5), 0.2).param_groups[0]["momentum"], 0.5)
