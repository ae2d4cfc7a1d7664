"""DP-SGD: clipped per-unit gradients, summed, noised, divided by a declared size.

Built on Opacus's ``DPOptimizer`` and its samplers; what differs, and why:

* The divisor is ``sampling_rate · declared_size``, both public. Opacus derives it from ``len(dataset)``.
* A unit whose gradient is not finite, or above 2^60, contributes exact zeros by selection. Multiplying by a
  zero factor keeps NaN, and the update then shows whether that unit was present.
* Units are clipped by upper bounds of their norms, shrunk by 2^-10, so rounding cannot carry a contribution over the
  bound; sums of several physical batches accumulate in fp64.
* Noise comes from the node's secret and is added to every trained parameter, even to experts that no token reached.
* An empty Poisson batch is a step of pure noise.

The mechanism's parameters are in :mod:`conclave.privacy.training.dpsgd_mechanism`, its steps in
:mod:`conclave.privacy.training.private_training`; a step adds up clipped gradients
(:mod:`conclave.privacy.training.accumulation`) and noises the sum (:mod:`conclave.privacy.training.unit_optimizer`).

Guarantee: with noise multiplier σ and rate q, one step is the Poisson-subsampled Gaussian mechanism with sensitivity 1
in units of ``clip`` under add/remove of one unit (Abadi et al. 2016, arXiv:1607.00133). At numeric level ``fast`` this
assumes that weights do not amplify rounding across units; at ``strict`` it does not (see docs/privacy.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from conclave.model.records import Records
from conclave.privacy.gradients.modes import ExampleLoss, unit_mean
from conclave.privacy.gradients.physical_batch import MOST, Room
from conclave.privacy.gradients.unit_draws import poisson_sample
from conclave.privacy.gradients.unit_index import UnitIndex
from conclave.privacy.training.dpsgd_mechanism import DpSgd
from conclave.privacy.training.local_optimizers import make_optimizer
from conclave.privacy.training.private_training import PrivateTraining


class Outcome(NamedTuple):
    """What training left besides the parameters: the clip bound, and the released loads by name."""

    clip: float
    loads: Mapping[str, Tensor]


def train_privately(
    module: nn.Module,
    example_loss: ExampleLoss,
    records: Records,
    mechanism: DpSgd,
    secret: bytes,
    *,
    group_B: Tensor | None = None,
    scales: dict[str, float] | None = None,
    room: Room | None = None,
    contain: bool = False,
) -> Outcome:
    """Run ``mechanism.steps`` steps of DP-SGD on ``module`` in place.

    Args:
        module: its parameters are all trained. The forward pass must keep units independent and state unchanged.
        example_loss: called with a batch of examples taken from ``records``.
        records: named tensors; the first axis is the example.
        mechanism: the public parameters that the ledger was charged for.
        secret: 256 bits that nobody else knows; the same secret replays the same mechanism.
        group_B: int64, the group of each record, where groups are the unit; None where each record is one.
        scales: parameter name → factor on the learning rate; public.
        room, contain: see :class:`PrivateTraining`.

    Guarantee: the parameters, the clip bound afterwards and the loads are together a release of ``steps`` composed
    Poisson-subsampled Gaussian mechanisms with the given rate and σ; nothing else leaves this function.

    Raises:
        BadInputError: the module holds a layer that cannot be made private, or has no expert loads to release.
    """
    optimizer = make_optimizer(module, mechanism.optimizer, mechanism.learning_rate, scales)
    index = UnitIndex(len(next(iter(records.values()))), group_B, mechanism.records_per_unit)
    if mechanism.noise_multiplier is None:
        most = room or Room(mechanism.physical_batch or MOST)
        _train_without_privacy(module, optimizer, example_loss, records, index, mechanism, secret, most)
        return Outcome(mechanism.clip, {})
    with PrivateTraining(module, optimizer, example_loss, mechanism, secret, room=room, contain=contain) as training:
        for _ in range(mechanism.steps):
            training.step(records, index)
        return Outcome(training.clip, training.loads)


def _train_without_privacy(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    example_loss: ExampleLoss,
    records: Records,
    index: UnitIndex,
    mechanism: DpSgd,
    secret: bytes,
    room: Room,
) -> None:
    module.train()
    for step in range(mechanism.steps):
        chosen = poisson_sample(index.count, mechanism.sampling_rate, secret, step)
        optimizer.zero_grad()
        for physical in index.batches(chosen, room):
            batch = {name: tensor[physical.example_B.to(tensor.device)] for name, tensor in records.items()}
            loss_B = example_loss(batch)
            mean = unit_mean(loss_B, physical.units.to(loss_B.device)).sum()
            if physical.of_unit is not None:
                mean = loss_B.sum() / physical.of_unit
            (mean / mechanism.divisor).backward()
        optimizer.step()
