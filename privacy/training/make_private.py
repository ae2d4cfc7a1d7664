"""Differential privacy for a plain torch model, without Flower, nodes or a ledger."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from conclave.base.allowed import check_number
from conclave.base.errors import BadInputError
from conclave.privacy.accounting.accountants import epsilon_by_accountant
from conclave.privacy.accounting.mechanisms import LARGEST_NOISE, SampledGaussian
from conclave.privacy.gradients.modes import ExampleLoss
from conclave.privacy.randomness import SECRET_BYTES, fresh_secret
from conclave.privacy.training.dpsgd_mechanism import DpSgd
from conclave.privacy.training.private_training import PrivateTraining

BELOW_ONE = math.nextafter(1.0, 0.0)
OPTIONS = frozenset(f.name for f in dataclasses.fields(DpSgd)) - {"steps", "learning_rate", "optimizer", "load_share"}
"""What may be said of the mechanism; the optimizer is the caller's, and expert loads are the federation's."""


class AccountedTraining(PrivateTraining):
    """:class:`PrivateTraining` that says what its steps cost. It keeps no ledger: the caller keeps count."""

    def epsilon(self, delta: float) -> dict[str, float]:
        """Return ε of the steps taken so far by three accountants: ``rdp``, ``pld``, ``prv``; 0 before the first.

        Raises:
            BadInputError: ``delta`` is not above 0 and below 1.
        """
        check_number("delta", delta, 0.0, BELOW_ONE, above=True)
        if not self.step_number:
            return {"rdp": 0.0, "pld": 0.0, "prv": 0.0}
        mechanism = self.mechanism
        if mechanism.noise_multiplier is None:
            raise ValueError("there is no ε without noise")
        charge = SampledGaussian(
            sampling_rate=mechanism.sampling_rate, noise_multiplier=mechanism.noise_multiplier, steps=self.step_number
        )
        return epsilon_by_accountant([charge], delta)


def check_options(options: Iterable[str]) -> None:
    """Check the names of options.

    Raises:
        BadInputError: one of them is not in :data:`OPTIONS`.
    """
    for name in sorted(set(options) - OPTIONS):
        raise BadInputError(f"{name} is no option, must be one of {', '.join(sorted(OPTIONS))}")


def make_private(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    example_loss: ExampleLoss,
    *,
    noise_multiplier: float,
    sampling_rate: float,
    clip: float,
    declared_size: int,
    simulation_secret: bytes | None = None,
    **options: Any,
) -> AccountedTraining:
    """Attach DP-SGD to a model and its optimizer; call :meth:`~PrivateTraining.step` with all records each time.

    >>> import conclave, torch
    >>> model = torch.nn.Linear(10, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    >>> records = {"x": torch.randn(500, 10), "y": torch.randint(2, (500,))}
    >>> def example_loss(batch):
    ...     return torch.nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
    >>> with conclave.make_private(
    ...     model, optimizer, example_loss, noise_multiplier=1.0, sampling_rate=0.05, clip=1.0, declared_size=500
    ... ) as training:
    ...     for _ in range(10):
    ...         training.step(records)
    ...     spent = training.epsilon(1e-5)
    >>> {accountant: round(epsilon, 1) for accountant, epsilon in spent.items()}
    {'rdp': 2.2, 'pld': 1.7, 'prv': 1.7}

    Args:
        module: any torch model whose layers keep examples apart; see :mod:`conclave.privacy.bookkeeping.layers` for
            those that are fast, others are materialised unit by unit (``training.fallbacks`` names them).
        optimizer: any torch optimizer over the module's parameters. It sees noised gradients only.
        example_loss: maps a batch, named tensors, to one loss per example, [B].
        noise_multiplier: σ, > 0.
        sampling_rate: Poisson rate in (0, 1], public.
        clip: L2 bound of a unit's gradient, at least 1e-12.
        declared_size: public number of units; do not compute it from the data without saying so.
        simulation_secret: 32 bytes that fix all randomness. For experiments only: whoever knows them can subtract
            the noise. By default they come from the operating system.
        options: further fields of :class:`~conclave.privacy.training.dpsgd_mechanism.DpSgd`: ``clipping``, ``numeric``,
            ``gradients``, ``records_per_unit``, ``physical_batch``, ``memory_bytes``.

    Guarantee: after n steps, what the parameters show is the n-fold composition of Poisson-subsampled Gaussian
    mechanisms with σ and the rate, for adding or removing one unit.

    Raises:
        BadInputError: a value out of range or of another type, an unknown option or word, or a layer that cannot be
            made private. The first step raises it too, before any record is used, where the gradient of a parameter
            is not accounted for (:mod:`conclave.privacy.training.accounted`).
    """
    for name, value, is_one, what in (
        ("module", module, isinstance(module, nn.Module), "a torch module"),
        ("optimizer", optimizer, isinstance(optimizer, torch.optim.Optimizer), "a torch optimizer"),
        ("example_loss", example_loss, callable(example_loss), "a function of a batch"),
        ("simulation_secret", simulation_secret, isinstance(simulation_secret, bytes | None), "bytes"),
    ):
        if not is_one:
            raise BadInputError(f"{name} is a {type(value).__name__}, must be {what}")
    if simulation_secret is not None and len(simulation_secret) != SECRET_BYTES:
        raise BadInputError(f"simulation_secret has {len(simulation_secret)} bytes, must have {SECRET_BYTES}")
    check_options(options)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and id(parameter) not in held:
            raise BadInputError(f"parameter {name} is trained but not in the optimizer; add it or freeze it")
    trained = {id(p) for p in module.parameters() if p.requires_grad}
    if not trained:
        raise BadInputError("the module has no trained parameter")
    if any(p.requires_grad and id(p) not in trained for group in optimizer.param_groups for p in group["params"]):
        raise BadInputError("the optimizer holds a parameter that is not the module's: it would get noise alone")
    # None, no privacy, is for simulations of the family's own; here a mechanism always has noise.
    check_number("noise_multiplier", noise_multiplier, 0.0, LARGEST_NOISE, above=True)
    mechanism = DpSgd(
        steps=1,
        learning_rate=0.0,  # the optimizer's own counts
        sampling_rate=sampling_rate,
        clip=clip,
        noise_multiplier=noise_multiplier,
        declared_size=declared_size,
        **options,
    )
    parts = mechanism.clipping == "per-layer" or mechanism.records_per_unit is not None
    if parts and mechanism.gradients == "ghost" and mechanism.numeric == "fast":
        raise BadInputError("gradients 'ghost' knows records as units and clips them as a whole; use 'bookkeeping'")
    return AccountedTraining(module, optimizer, example_loss, mechanism, simulation_secret or fresh_secret())
