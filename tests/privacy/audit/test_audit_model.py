"""The model audit passes what is right, and each sabotage is caught by the check it is named with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import make_batch, make_config, make_text, make_text_config
from torch import nn

from conclave.model.building import build
from conclave.model.layers.unit_random import UnitDropout
from conclave.privacy.audit import sampling_and_noise
from conclave.privacy.audit.model import CHECKS, audit_model
from conclave.privacy.audit.sampling_and_noise import check_participation
from conclave.privacy.audit.subject import Subject
from conclave.privacy.gradients.clipping import clip_factors
from conclave.privacy.gradients.modes import ClippedSum, Hooks, clipped_sum
from conclave.privacy.randomness import standard_normal
from conclave.privacy.training.dpsgd_mechanism import DpSgd
from conclave.privacy.training.private_training import PrivateTraining
from conclave.privacy.training.unit_optimizer import UnitDPOptimizer

MECHANISM = DpSgd(
    steps=1, learning_rate=1.0, sampling_rate=0.1, clip=0.5, noise_multiplier=1.0, declared_size=100, physical_batch=32
)


@pytest.fixture(autouse=True)
def _few_values(monkeypatch):
    monkeypatch.setattr(sampling_and_noise, "NOISE_VALUES", 6_000)


class Net(nn.Module):
    """A small model with random inputs; subclasses break it."""

    def __init__(self, *layers):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 64), *layers, nn.Tanh(), nn.Linear(64, 5))

    def forward(self, x):
        return self.body(x)

    def loss(self, batch):
        return F.cross_entropy(self(batch["x"]), batch["y"], reduction="none")


def batch():
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(8, 12, generator=generator),
        "y": torch.randint(5, (8,), generator=generator),
    }


def verdicts(module, mechanism=MECHANISM, start=PrivateTraining, records=None, loss=None):
    findings = audit_model(Subject(module, loss or module.loss, records or batch(), mechanism, start))
    return {finding.check: finding.violation for finding in findings}


def violated(*args, **options):
    return {check for check, violation in verdicts(*args, **options).items() if violation}


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "flat"),
        ({}, "adaptive"),
        ({"gradients": "hooks"}, "per-layer"),
        ({"numeric": "strict"}, "automatic"),
        ({"numeric": "strict"}, "adaptive"),
    ],
)
def test_an_honest_model_passes_in_every_mode(options, kind):
    torch.manual_seed(0)
    network = build(make_config(), seed=3)
    found = verdicts(network, replace(MECHANISM, clipping=kind, **options), records=make_batch(8))
    assert set(found) == {
        "layers", "gradients", "isolation", "state", "sensitivity", "numerics", "participation", "noise", "faults"
    }  # fmt: skip
    assert not any(found.values()), found


def test_a_transformer_and_private_dropout_pass():
    assert not violated(build(make_text_config(), seed=3), records=make_text(8))
    assert not violated(Net(UnitDropout(0.3)))


def test_the_audit_leaves_the_model_as_it_was():
    module = Net()
    before = {name: p.clone() for name, p in module.state_dict().items()}
    verdicts(module)
    assert all(torch.equal(p, before[name]) for name, p in module.state_dict().items())


# --- broken models ---------------------------------------------------------------------------------------------


class BatchBalance(Net):
    def loss(self, batch):
        share = self(batch["x"]).softmax(-1).mean(0)  # over the batch
        return super().loss(batch) + share.square().sum()


class Capacity(Net):
    def loss(self, batch):
        scores = self(batch["x"])
        chosen = scores.argmax(-1)
        rank = torch.stack([(chosen[:i] == c).sum() for i, c in enumerate(chosen)])
        kept = (rank < 2).unsqueeze(-1)  # each expert takes two of the batch
        return F.cross_entropy(scores * kept, batch["y"], reduction="none")


class Running(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(12))

    def loss(self, batch):
        with torch.no_grad():
            self.mean.lerp_(batch["x"].mean(0), 0.1)
        return super().loss(batch)


class SharedStream(Net):
    def loss(self, batch):
        return F.cross_entropy(F.dropout(self(batch["x"]), 0.5), batch["y"], reduction="none")


class UsedOutsideItsLayer(Net):
    def loss(self, batch):
        hidden = F.linear(batch["x"], self.body[0].weight)  # the layer's forward, and with it every hook, is passed by
        return F.cross_entropy(self.body[1:](hidden), batch["y"], reduction="none")


@pytest.mark.parametrize(
    ("module", "check"),
    [
        (BatchBalance, "isolation"),
        (Capacity, "isolation"),
        (Running, "state"),
        (SharedStream, "isolation"),
        (lambda: Net(nn.BatchNorm1d(64)), "layers"),
        (lambda: Net(nn.Dropout(0.5)), "layers"),
    ],
)
def test_a_broken_model_is_caught(module, check):
    torch.manual_seed(0)
    broken = module()
    if check == "layers":  # what the others find decides
        assert check in violated(broken)
    else:
        assert CHECKS[check](Subject(broken, broken.loss, batch(), MECHANISM)).violation


def test_a_weight_used_outside_its_layer_is_no_violation_but_training_refuses_it():
    module = UsedOutsideItsLayer()
    findings = {f.check: f for f in audit_model(Subject(module, module.loss, batch(), MECHANISM))}
    assert "parameter body.0.weight is used outside" in findings["layers"].incomplete
    assert not any(f.violation for f in findings.values())
    assert set(findings) == {"layers", "isolation", "state"}


@pytest.mark.parametrize("rate", [1e-4, 0.02, 0.7, 1.0])
def test_honest_sampling_passes_at_every_rate_and_a_wrong_one_does_not(rate):
    subject = Subject(Net(), Net().loss, batch(), replace(MECHANISM, sampling_rate=rate))
    assert check_participation(subject).violation is None
    assert check_participation(replace(subject, start=Shuffled)).violation
    assert check_participation(replace(subject, start=WrongRate)).violation


def test_the_audit_leaves_torchs_generator_and_the_mode_alone():
    module = Net().eval()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    verdicts(module)
    assert torch.equal(torch.rand(1), expected)
    assert not module.training


def test_batch_norm_by_hand_is_caught_without_its_name():
    class ByHand(Net):
        def loss(self, batch):
            x = batch["x"]
            return super().loss({"x": (x - x.mean(0)) / x.std(0, correction=0).clamp(min=1e-3), "y": batch["y"]})

    assert "isolation" in violated(ByHand())


# --- broken training -------------------------------------------------------------------------------------------


class BrokenMode(Hooks):
    """Opacus's per-sample gradients, with factors that a subclass gets wrong."""

    def factors(self, norms_PU, clip):
        raise NotImplementedError

    def clipped_sum(self, loss, batch, units, clipping):
        loss(batch).sum().backward()
        gradients = [vars(p)["grad_sample"] for p in self._trained]
        for p in self._trained:
            vars(p)["grad_sample"], p.grad = None, None
        norms_PU = torch.stack([g.flatten(1).double().norm(dim=1) for g in gradients])
        factors = self.factors(norms_PU, clipping.clip)
        return ClippedSum([self.add(g, f) for g, f in zip(gradients, factors, strict=True)], 0.0)

    def add(self, gradient, factor):
        return clipped_sum(gradient, factor)


class NoClip(BrokenMode):
    def factors(self, norms_PU, clip):
        return torch.ones_like(norms_PU)


class ClipEach(BrokenMode):
    """Every tensor, for instance every expert, to C by itself instead of all jointly."""

    def factors(self, norms_PU, clip):
        return torch.stack([clip_factors(n, clip) for n in norms_PU])


class MultiplyByZero(BrokenMode):
    def factors(self, norms_PU, clip):
        return clip_factors(norms_PU.square().sum(0).sqrt(), clip).expand_as(norms_PU)

    def add(self, gradient, factor):
        return torch.einsum("u,u...->...", factor, gradient.double())  # 0·NaN


def training(mode):
    class Broken(PrivateTraining):
        def __init__(self, *args):
            super().__init__(*args)
            self._mode.close()
            self._mode = mode(self._module)

    return Broken


class FewNoise(UnitDPOptimizer):
    def __init__(self, *args):
        super().__init__(*args)
        self.noise_multiplier *= 0.5


class SlightlyLessNoise(UnitDPOptimizer):
    def __init__(self, *args):
        super().__init__(*args)
        self.noise_multiplier *= 0.98


class NoNoise(UnitDPOptimizer):
    def __init__(self, *args):
        super().__init__(*args)
        self.noise_multiplier = 0.0


class UntouchedWithoutNoise(UnitDPOptimizer):
    def add_noise(self):
        untouched = [total is None or not bool(total.any()) for total in self._sums]
        parts = [None if total is None else (total != 0) for total in self._sums]
        super().add_noise()
        for p, skip, part in zip(self.params, untouched, parts, strict=True):
            if skip:
                p.grad.zero_()
            elif part is not None and p.dim() == 3:  # stacked experts
                p.grad *= part.flatten(1).any(1).view(-1, 1, 1)


class OneNoiseForAll(UnitDPOptimizer):
    def add_noise(self):
        sums = self.take_sums()
        for p, total in zip(self.params, sums, strict=True):
            noise = standard_normal(bytes(32), p.numel()).view_as(p)
            p.grad = ((total + noise * self.max_grad_norm * self.noise_multiplier) / self.expected_batch_size).float()


def noised_by(optimizer):
    class Broken(PrivateTraining):
        def __init__(self, module, inner, loss, mechanism, secret):
            super().__init__(module, inner, loss, mechanism, secret)
            self._optimizer = optimizer(inner, mechanism)

    return Broken


class Shuffled(PrivateTraining):
    """Batches of a fixed size, each unit once per epoch."""

    def sample(self, units):
        size = max(1, round(units * self.mechanism.sampling_rate))
        batches = max(1, units // size)
        generator = torch.Generator().manual_seed(self.step_number // batches)
        place = self.step_number % batches
        return torch.randperm(units, generator=generator)[place * size : (place + 1) * size].sort().values


class WrongRate(PrivateTraining):
    def sample(self, units):
        honest = super().sample(units)
        return torch.cat([honest, torch.arange(units)[:: max(2, units // 10)]]).unique()


@pytest.mark.parametrize(
    ("start", "check"),
    [
        (training(NoClip), "sensitivity"),
        (training(ClipEach), "sensitivity"),
        (training(MultiplyByZero), "faults"),
        (noised_by(FewNoise), "noise"),
        (noised_by(SlightlyLessNoise), "noise"),
        (noised_by(NoNoise), "noise"),
        (noised_by(UntouchedWithoutNoise), "noise"),
        (noised_by(OneNoiseForAll), "noise"),
        (Shuffled, "participation"),
        (WrongRate, "participation"),
    ],
)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore:invalid value encountered")
def test_broken_training_is_caught(start, check, monkeypatch):
    monkeypatch.setattr(sampling_and_noise, "NOISE_VALUES", 60_000)
    network = build(make_config(routed=32, shared=0), seed=3)
    assert CHECKS[check](Subject(network, network.loss, make_batch(8), MECHANISM, start)).violation


def test_norms_that_cancel_are_caught():
    """Opacus's ghost mode, whose norms are Gram matrices in float32."""
    assert violated(Net(), replace(MECHANISM, gradients="ghost")) == {"numerics"}


def test_a_model_whose_loss_cannot_be_run_alone_is_a_violation_with_the_reason():
    class Pairs(Net):
        def loss(self, batch):
            if len(batch["x"]) < 2:
                raise ValueError("needs two")
            return super().loss(batch)

    found = verdicts(Pairs())
    assert found["isolation"] == "the loss fails for unit 0 alone, not among others: ValueError: needs two"
