"""Models of all kinds: what couples units or remembers them is found, what does neither is left in peace."""

from __future__ import annotations

import random
from dataclasses import replace

import audit_samples
import numpy
import pytest
import torch
from torch import nn

from conclave.base.errors import BadInputError
from conclave.privacy.audit import model as audit
from conclave.privacy.audit import sampling_and_noise
from conclave.privacy.audit.arithmetic import RoundedOnce
from conclave.privacy.audit.faults import check_faults
from conclave.privacy.audit.isolation import check_gradients, check_isolation, check_state
from conclave.privacy.audit.memory import Memory
from conclave.privacy.audit.model import audit_model
from conclave.privacy.audit.sensitivity import check_sensitivity
from conclave.privacy.audit.subject import Subject, verdict_of
from conclave.privacy.training.dpsgd_mechanism import DpSgd
from conclave.privacy.training.private_training import PrivateTraining

MECHANISM = DpSgd(steps=1, learning_rate=1.0, sampling_rate=0.1, clip=1.0, noise_multiplier=1.0, declared_size=100)
SMALL = replace(MECHANISM, physical_batch=32)
MANY = ("u_from_three_hundred_on",)
"""These couple batches alone that are larger than that."""


@pytest.fixture(autouse=True)
def _little_noise_is_looked_at(monkeypatch):
    monkeypatch.setattr(sampling_and_noise, "NOISE_VALUES", 500)  # so small a model needs many charges for more


def subject(build, mechanism=MECHANISM, **options):
    return Subject(*build(), mechanism, **options)


@pytest.mark.parametrize("name", audit_samples.COUPLED)
def test_what_couples_or_remembers_units_is_found(name):
    brought = subject(audit_samples.COUPLED[name], MECHANISM if name in MANY else SMALL)
    assert check_isolation(brought).violation or check_state(brought).violation


@pytest.mark.parametrize("name", audit_samples.INDEPENDENT)
def test_what_does_neither_is_not_violated(name):
    build = audit_samples.INDEPENDENT[name]
    brought = subject(build, SMALL, rebuild=lambda: build()[:2])
    for check in (check_gradients, check_isolation, check_state, check_sensitivity, check_faults):
        finding = check(brought)
        assert finding.violation is None, finding


def test_memory_that_python_does_not_show_is_found_where_the_model_can_be_built_again():
    def build():
        def remember():
            first = None
            while True:
                seen = yield first
                first = seen if first is None else first

        memory = remember()
        next(memory)
        return audit_samples.wrapped(
            lambda self, x: x - x * 0 if (first := memory.send(x.detach().mean(0))) is None else x - first
        )

    def wrapped_generator():
        module, loss, batch = build()
        loss(batch)  # from now on it has nothing to remember
        return module, loss, batch

    brought = subject(wrapped_generator, SMALL)
    assert check_state(brought).violation is None
    found = check_state(replace(brought, rebuild=lambda: build()[:2])).violation
    assert "built anew, its losses differ by" in found
    for rebuild in (lambda: 1 / 0, lambda: audit_samples.network(nn.Linear(8, 8))):
        assert check_state(replace(brought, rebuild=rebuild)).violation is None


@pytest.mark.parametrize("draw", [lambda: torch.rand(1), lambda: random.random(), lambda: numpy.random.rand()])
def test_what_is_drawn_for_no_unit_is_said_also_where_it_has_no_effect(draw):
    def drawing(chance):
        return lambda: audit_samples.wrapped(lambda self, x: x + (float(draw()) < chance))

    assert "with what a stream draws that all records share" in check_state(subject(drawing(0.5), SMALL)).violation
    finding = check_state(subject(drawing(-1.0), SMALL))
    assert (finding.violation, "draws from a stream" in finding.incomplete) == (None, True)


@pytest.mark.parametrize("share", [1e-3, 1e-5])
def test_a_small_coupling_is_told_from_rounding(share):
    def coupled():
        """Of labels: there is none that is not a number, which would show in any size."""
        module = audit_samples.network()

        def loss(b):
            others = share * b["y"].double().mean().float()
            return audit_samples.entropy(module(b["x"] * (1 + others)), b)

        return module, loss, audit_samples.rows()

    assert check_isolation(subject(coupled, SMALL)).violation


def test_a_layer_that_is_refused_but_couples_nothing_makes_the_audit_incomplete():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.memory(x.view(len(x), 2, 3))[0][:, -1])

    module = Recurrent()
    findings = audit_model(
        Subject(module, lambda b: audit_samples.entropy(module(b["x"]), b), audit_samples.rows(), SMALL)
    )
    assert verdict_of(findings) == "INCOMPLETE"
    assert [f.check for f in findings] == ["layers", "isolation", "state"]
    assert "GRU" in findings[0].incomplete


def test_a_check_that_fails_says_so_and_the_others_still_run(monkeypatch):
    def fails(subject):
        raise TypeError("no such argument\nand a second line")

    monkeypatch.setitem(audit.CHECKS, "sensitivity", fails)
    findings = {f.check: f for f in audit_model(subject(audit_samples.u_first_example_leads, SMALL))}
    assert findings["sensitivity"].incomplete == "TypeError: no such argument"
    assert findings["isolation"].violation
    assert len(findings) == 9
    assert verdict_of(findings.values()) == "VIOLATED"


def test_what_is_no_number_at_one_size_is_not_hidden_by_another():
    class Overflows(PrivateTraining):
        def sums_without_noise(self, records, index, chosen):
            sums = super().sums_without_noise(records, index, chosen)
            large = float(self._loss(records).detach().abs().max()) > 1e4
            return [total * float("nan") if large else total for total in sums]

    assert check_sensitivity(subject(audit_samples.s_private_dropout, SMALL, start=Overflows)).violation


def test_the_audit_puts_back_what_a_model_remembers():
    module, loss, batch = audit_samples.u_a_list_of_what_was_seen()
    audit_model(Subject(module, loss, batch, SMALL))
    assert module.seen == []


def test_the_audit_leaves_records_as_they_were():
    module, loss, batch = audit_samples.s_changes_its_input_in_place()
    before = {name: tensor.clone() for name, tensor in batch.items()}
    audit_model(Subject(module, loss, batch, SMALL))
    assert all(torch.equal(batch[name], tensor) for name, tensor in before.items())


def unusable(loss=None, module=None, **records):
    module = module or audit_samples.network()
    made = loss or (lambda m, b: audit_samples.entropy(m(b["x"]), b))
    return Subject(module, lambda b: made(module, b), audit_samples.rows() | records, SMALL)


@pytest.mark.parametrize(
    ("brought", "sentence"),
    [
        (unusable(lambda m, b: m(b["x"]).sum()), 'with one loss per example: [8], or [8, tasks]; use reduction="none"'),
        (unusable(lambda m, b: {"loss": m(b["x"])}), "returns dict"),
        (unusable(lambda m, b: (m(b["x"]), 1)), "returns tuple"),
        (unusable(lambda m, b: 0.5), "returns float"),
        (unusable(lambda m, b: m(b["x"])[:3]), "shape [3, 3]"),
        (unusable(lambda m, b: m(b["x"]).argmax(1)), "returns torch.int64, must be a floating-point type"),
        (unusable(lambda m, b: m(b["x"]).sum(1).detach()), "must not be detached"),
        (unusable(lambda m, b: m(b["x"]).exp().mul_(2).sum(1)), "the gradient of example_loss cannot be taken: Ru"),
        (unusable(lambda m, b: m(b["z"])), "fails on the batch that was returned with it: KeyError"),
        (unusable(x=torch.full((8, 6), float("nan"))), "the loss of example 0 of the batch is not finite"),
        (unusable(module=audit_samples.network().requires_grad_(False)), "nothing is trained"),
        (unusable(module=nn.Sequential(nn.LazyLinear(3))), "parameter 0.weight has no shape yet"),
    ],
)  # fmt: skip
def test_what_cannot_be_audited_is_said_in_one_sentence(brought, sentence):
    with pytest.raises(BadInputError) as caught:
        audit_model(brought)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_arithmetic_that_rounds_once_keeps_types_and_agrees_with_float64():
    torch.manual_seed(0)
    x, layer = torch.randn(33, 40), nn.Linear(40, 5)
    exact = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double()).softmax(1)
    with RoundedOnce() as arithmetic:
        out = layer(x).softmax(1)
        half = layer.bfloat16()(x.bfloat16())
    assert out.dtype == torch.float32
    assert (out.double() - exact).abs().max() < 2e-7
    assert (half.dtype, arithmetic.coarsest, arithmetic.as_they_are) == (torch.bfloat16, torch.bfloat16, {})
    assert torch.equal(half, half.double().bfloat16())


def test_an_operation_in_place_is_rounded_once_too():
    x = torch.full((3,), 0.1)
    with RoundedOnce():
        x.mul_(3.0).add_(torch.ones(3))
    assert torch.equal(x, (torch.full((3,), 0.1) * 3.0 + 1.0))


def test_memory_is_put_back_wherever_it_lies():
    held = {"a": [1, {"b": torch.zeros(2)}], "c": {1, 2}}
    generator = torch.Generator().manual_seed(1)

    def uses():
        return held, generator

    memory, shown = Memory(uses=uses), Memory(uses=uses).fingerprint()
    state = generator.get_state()
    held["a"][1]["b"] += 1.0
    held["a"].append(3)
    held["c"].add(5)
    held["d"] = None
    torch.rand(1, generator=generator)
    assert Memory(uses=uses).fingerprint() != shown
    memory.restore()
    assert Memory(uses=uses).fingerprint() == shown
    assert set(held) == {"a", "c"}
    assert torch.equal(generator.get_state(), state)
