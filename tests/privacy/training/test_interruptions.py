"""Steps that an exception ends: nothing of them enters a later one, their noise is used up, and they are counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import make_batch, make_config

from conclave.model.building import build
from conclave.privacy.gradients.unit_index import UnitIndex
from conclave.privacy.randomness import derive
from conclave.privacy.training.dpsgd_mechanism import DpSgd
from conclave.privacy.training.make_private import make_private
from conclave.privacy.training.private_training import PrivateTraining

SECRET = derive(bytes(32), "interruption test")
FULL = DpSgd(
    steps=1, learning_rate=1.0, sampling_rate=1.0, clip=0.5, noise_multiplier=1e-12, declared_size=10, physical_batch=4
)  # so little noise that the update shows the clipped sum; everyone is sampled
MODES = {
    "bookkeeping": {"gradients": "bookkeeping"},
    "hooks": {"gradients": "hooks"},
    "ghost": {"gradients": "ghost"},
    "strict": {"numeric": "strict"},
}


class Interrupted(BaseException):
    """As KeyboardInterrupt, which is no Exception either."""


def training_of(network, mechanism, loss=None, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(network.parameters(), lr=1.0)
    return PrivateTraining(network, optimizer, loss or network.loss, mechanism, SECRET)


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_step_after_is_as_if_the_interrupted_one_had_not_been(mode, where):
    """With its sums kept, a unit would count twice; Opacus's hooks also keep what they saw going forward."""
    mechanism, batch = replace(FULL, **MODES[mode]), make_batch(6)
    network = build(make_config(), seed=3)
    calls, counting = [], []

    def loss(part):
        found = network.loss(part)
        if not counting:
            return found
        calls.append(len(part["label"]))
        if len(calls) == 2 and where == "forward":
            raise Interrupted
        if len(calls) == 2:
            found.register_hook(interrupt)
        return found

    def interrupt(_):
        raise Interrupted

    index, everyone = UnitIndex(6), torch.arange(6)
    with training_of(network, mechanism, loss) as training:
        training.sums_without_noise(batch, index, everyone)  # the model is looked at before the first step
        counting.append(True)
        with pytest.raises(Interrupted):
            training.step(batch)
        assert training.step_number == 1
        again = flat(training.sums_without_noise(batch, index, everyone))
    with training_of(network, mechanism) as training:
        clean = flat(training.sums_without_noise(batch, index, everyone))
    assert float((again - clean).norm() / clean.norm()) < 1e-6


def test_noise_that_an_update_showed_is_never_used_again():
    """The optimizer raises after it has changed the parameters: the difference to the next update is no gradient."""

    class Raising(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            raise Interrupted

    network, batch = build(make_config(), seed=3), make_batch(4)
    mechanism = replace(FULL, noise_multiplier=2.0)
    updates = []
    with training_of(network, mechanism, optimizer=Raising(network.parameters(), lr=1.0)) as training:
        for _ in range(2):
            before = flat(network.parameters())
            with pytest.raises(Interrupted):
                training.step(batch)
            updates.append(before - flat(network.parameters()))
        assert training.step_number == 2
    # Independent noise correlates by less than 5/√n, by far; the same noise by nearly 1.
    assert abs(float(torch.corrcoef(torch.stack(updates))[0, 1])) < 5 / len(updates[0]) ** 0.5


def test_gradients_that_are_shown_count_as_a_step():
    module, batch = torch.nn.Linear(3, 1), {"x": torch.randn(8, 3, generator=torch.Generator().manual_seed(0))}

    def attached():
        return make_private(
            module, torch.optim.SGD(module.parameters(), lr=0.1), lambda part: module(part["x"]).square().flatten(),
            noise_multiplier=1.0, sampling_rate=0.5, clip=1.0, declared_size=8,
        )  # fmt: skip

    with attached() as showing:
        shown = [flat(showing.noised_gradients(batch, UnitIndex(8))) for _ in range(2)]
    assert not torch.equal(*shown)
    with attached() as stepping:
        stepping.step(batch)
        stepping.step(batch)
    assert showing.epsilon(1e-5) == stepping.epsilon(1e-5)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_nothing_of_an_interrupted_pass_stays_on_the_module(mode):
    network = build(make_config(), seed=3)

    def loss(part):
        network.loss(part)
        raise Interrupted

    before = [set(vars(layer)) for layer in network.modules()]
    with training_of(network, replace(FULL, **MODES[mode]), loss) as training, pytest.raises(Interrupted):
        training.step(make_batch(4))
    assert [set(vars(layer)) for layer in network.modules()] == before
    assert not any(hasattr(p, "_forward_counter") for p in network.parameters())
