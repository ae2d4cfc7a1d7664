"""Every member of the model family: clipped sums in every mode against the units alone, and the model audit."""

from __future__ import annotations

import pytest
import torch
from conftest import in_the_soak_unless
from family_samples import FAMILY, examples_for
from microbatches import alone, relative_error

from conclave.model.building import build
from conclave.privacy.audit.model import audit_model
from conclave.privacy.audit.subject import Subject
from conclave.privacy.bookkeeping import Units
from conclave.privacy.gradients.modes import GRID_BITS, Clipping, mode_for
from conclave.privacy.training.dpsgd_mechanism import DpSgd

MECHANISM = DpSgd(
    steps=1, learning_rate=1.0, sampling_rate=0.1, clip=0.5, noise_multiplier=1.0, declared_size=100, physical_batch=32
)


def records(name, examples):
    return examples_for(FAMILY[name], examples)


@pytest.mark.parametrize("mode", ["bookkeeping", "hooks", "ghost", "strict"])
@pytest.mark.parametrize("name", FAMILY)
def test_the_clipped_sum_of_every_mode_is_that_of_the_units_alone(name, mode):
    network, batch = build(FAMILY[name], seed=3), records(name, 5)
    truth = alone(network, network.loss, batch, torch.arange(5))
    norm_U = torch.stack([g.flatten(1).double().norm(dim=1) for g in truth.values()]).norm(dim=0)
    clip = float(norm_U.median())  # some are clipped, some are not
    attached = mode_for(mode, network)
    found = attached.clipped_sum(network.loss, batch, Units.one_each(5), Clipping("flat", clip)).sums
    attached.close()
    factor_U = (clip / norm_U).clamp(max=1.0)
    for total, gradient in zip(found, truth.values(), strict=True):
        sum_in_units = total.double() * (clip * 2.0**-GRID_BITS if mode == "strict" else 1.0)
        # Certified bounds and the shrinking by 2^-10 make clipped units a little smaller.
        assert relative_error(sum_in_units, torch.einsum("u,u...->...", factor_U, gradient.double())) < 5e-3


AUDITED_ALWAYS = ("after next, latent", "deep-moe, gated")


@pytest.mark.parametrize("name", in_the_soak_unless(AUDITED_ALWAYS, FAMILY))
def test_the_audit_finds_nothing(name):
    network = build(FAMILY[name], seed=3)
    findings = audit_model(Subject(network, network.loss, records(name, 8), MECHANISM))
    assert not [f for f in findings if f.violation], findings
