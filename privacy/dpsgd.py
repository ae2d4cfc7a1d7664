"""DP-SGD: clipped per-unit gradients, summed, noised, divided by a declared size.

Built on Opacus's hooks and its ``DPOptimizer``; what differs, and why:

* The divisor is ``sampling_rate · declared_size``, both public. Opacus derives it from ``len(dataset)``.
* A unit whose gradient is not finite, or above 2^60, contributes exact zeros by selection. Multiplying by a
  zero factor keeps NaN, and the update then shows whether that unit was present.
* Norms are taken in fp64 of the very tensor that is summed, and shrunk by 2^-10, so rounding cannot carry a
  contribution over the bound; sums accumulate in fp64.
* Noise comes from the node's secret and is added to every trained parameter, also experts no token reached.
* An empty Poisson batch is a step of pure noise.

Guarantee: with noise multiplier σ and rate q, one step is the Poisson-subsampled Gaussian mechanism with
sensitivity 1 in units of ``clip`` under add/remove of one unit (Abadi et al. 2016, arXiv:1607.00133), at
numeric level ``fast`` (see docs/privacy.md).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

import privacy.gradients  # noqa: F401  (registers our layers' samplers with Opacus)
from privacy.randomness import derive, standard_normal
from privacy.sampling import poisson_sample

Records = Mapping[str, Tensor]
UnitLoss = Callable[[Records], Tensor]
"""Maps a batch of B units to B losses; a unit's loss depends on that unit alone."""

LARGEST_NORM = 2.0**60
SHRINK = 1.0 - 2.0**-10


@dataclass(frozen=True, kw_only=True)
class DpSgd:
    """The mechanism of one charge. Every field is public.

    noise_multiplier: σ; the noise added to a clipped sum has standard deviation σ·clip. None means no privacy:
        neither clipping nor noise (simulation only).
    declared_size: the public number of units; with ``sampling_rate`` it fixes the divisor.
    physical_batch: units processed at once; bounds memory, changes the result by rounding only.
    """

    steps: int
    learning_rate: float
    sampling_rate: float
    clip: float
    noise_multiplier: float | None
    declared_size: int
    gradients: Literal["hooks", "ghost"] = "hooks"
    physical_batch: int = 512

    @property
    def divisor(self) -> float:
        """Expected units in a batch, the public divisor of the sum."""
        return self.sampling_rate * self.declared_size


def clip_factors(norm_B: Tensor, clip: float) -> Tensor:
    """Return the factor of each unit, float64: ``min(1, clip·(1 − 2^-10)/norm)``, and 0 where unusable.

    Args:
        norm_B: float64 norms, ≥ 0; a value that is not finite or exceeds 2^60 gives factor 0.
    """
    usable_B = norm_B.isfinite() & (norm_B <= LARGEST_NORM)
    safe_B = torch.where(usable_B, norm_B, 1.0)
    factor_B = (clip * SHRINK / safe_B.clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1.0)
    return torch.where(usable_B, factor_B, 0.0)


def clipped_sum(gradient_B: Tensor, factor_B: Tensor) -> Tensor:
    """Return Σ_b factor_b · gradient_b in float64, skipping units with factor 0 (they may hold NaN)."""
    keep_B = factor_B > 0.0
    return torch.einsum("b,b...->...", factor_B[keep_B], gradient_B[keep_B].double())


class UnitDPOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus is untyped
    """Opacus's optimizer with a certified clip, a declared divisor and the node's own noise.

    Works in both Opacus modes: call :meth:`accumulate_hooks` or :meth:`accumulate_ghost` for each physical
    batch, any number of times including zero, then :meth:`step` once.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, mechanism: DpSgd) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=mechanism.noise_multiplier,
            max_grad_norm=mechanism.clip,
            expected_batch_size=mechanism.divisor,
            loss_reduction="sum",
        )
        self.noise_secret: bytes | None = None
        self._sums = self._zero_sums()

    def accumulate_hooks(self) -> None:
        """Clip the ``grad_sample`` of every parameter jointly and add them to the running sums."""
        samples = [self._get_flat_grad_sample(p) for p in self.params]
        # One fused pass per parameter: the float64 copy of a unit's gradient is never materialised for its norm.
        norms = [torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64) for g in samples]
        factor_B = clip_factors(torch.linalg.vector_norm(torch.stack(norms), dim=0), self.max_grad_norm)
        for parameter, sample, total in zip(self.params, samples, self._sums, strict=True):
            total += clipped_sum(sample, factor_B)
            parameter.grad_sample = None

    def accumulate_ghost(self) -> None:
        """Add ``p.grad``, already the clipped sum of a physical batch, to the running sums."""
        for parameter, total in zip(self.params, self._sums, strict=True):
            total += parameter.grad.double()
            parameter.grad = None

    def _zero_sums(self) -> list[Tensor]:
        return [torch.zeros_like(parameter, dtype=torch.float64) for parameter in self.params]

    def add_noise(self) -> None:
        """Set ``p.grad`` to the sum plus noise, for every parameter, whether or not a unit reached it."""
        if self.noise_secret is None:
            raise RuntimeError("a step needs a noise secret of its own")
        std = self.noise_multiplier * self.max_grad_norm
        for index, (parameter, total) in enumerate(zip(self.params, self._sums, strict=True)):
            noise = standard_normal(derive(self.noise_secret, index), parameter.numel()).view_as(parameter)
            noisy = total + noise.to(parameter.device) * std
            parameter.grad = (noisy / self.expected_batch_size).to(parameter.dtype)
        self._sums = self._zero_sums()
        self.noise_secret = None  # noise is used once

    def noisy_step(self, noise_secret: bytes) -> None:
        """Noise the accumulated sums with a secret used for this step only, and take the step."""
        self.noise_secret = noise_secret
        self.add_noise()
        self.original_optimizer.step()
        self.original_optimizer.zero_grad()


class SelectingGhostHooks(GradSampleHooksFastGradientClipping):  # type: ignore[misc]  # Opacus is untyped
    """Opacus's ghost clipping with our clip factors."""

    def factors(self) -> Tensor:
        """Return the clip factor of each unit of the last backward pass, float64; 0 where unusable."""
        return clip_factors(self.get_norm_sample().double(), self.max_grad_norm)


def train_privately(module: nn.Module, unit_loss: UnitLoss, records: Records, mechanism: DpSgd, secret: bytes) -> None:
    """Run ``mechanism.steps`` steps of DP-SGD on ``module`` in place.

    Args:
        module: its parameters are all trained. The forward pass must keep units independent and state unchanged.
        unit_loss: called with a batch of units taken from ``records``.
        records: named tensors; the first axis is the unit, so a unit is one record.
        mechanism: the public parameters that the ledger was charged for.
        secret: 256 bits that nobody else knows; the same secret replays the same mechanism.

    Guarantee: the parameters afterwards are a release of ``steps`` composed Poisson-subsampled Gaussian
    mechanisms with the given rate and σ; nothing else leaves this function.
    """
    if mechanism.noise_multiplier is None:
        _train_without_privacy(module, unit_loss, records, mechanism, secret)
        return
    units = len(next(iter(records.values())))
    optimizer = UnitDPOptimizer(torch.optim.SGD(module.parameters(), lr=mechanism.learning_rate), mechanism)
    hooks = _attach(module, mechanism)
    module.train()
    try:
        with warnings.catch_warnings():
            # The first layer's input needs no gradient, which torch remarks on at every backward pass.
            warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
            for step in range(mechanism.steps):
                chosen = poisson_sample(units, mechanism.sampling_rate, secret, step)
                for part in chosen.split(mechanism.physical_batch):
                    _accumulate(unit_loss, _take(records, part), optimizer, hooks)
                optimizer.noisy_step(derive(secret, "noise", step))
    finally:
        hooks.cleanup()


def _attach(module: nn.Module, mechanism: DpSgd) -> GradSampleHooks:
    if mechanism.gradients == "hooks":
        return GradSampleHooks(module, loss_reduction="sum")
    return SelectingGhostHooks(module, loss_reduction="sum", max_grad_norm=mechanism.clip)


def _accumulate(unit_loss: UnitLoss, batch: Records, optimizer: UnitDPOptimizer, hooks: GradSampleHooks) -> None:
    if len(next(iter(batch.values()))) == 0:  # Poisson sampling drew nobody: only noise this step
        return
    loss_B = unit_loss(batch)
    if isinstance(hooks, SelectingGhostHooks):
        _accumulate_ghost(unit_loss, batch, loss_B, optimizer, hooks)
    else:
        loss_B.sum().backward()
        optimizer.accumulate_hooks()


def _accumulate_ghost(
    unit_loss: UnitLoss, batch: Records, loss_B: Tensor, optimizer: UnitDPOptimizer, hooks: SelectingGhostHooks
) -> None:
    loss_B.sum().backward(retain_graph=True)
    factor_B = hooks.factors()
    optimizer.original_optimizer.zero_grad()
    keep_B = factor_B > 0.0
    if bool(keep_B.all()):
        hooks.disable_hooks()
        (factor_B.to(loss_B.dtype) * loss_B).sum().backward()
        hooks.enable_hooks()
        optimizer.accumulate_ghost()
    else:
        # 0·inf is NaN in a backward pass: run again without the unusable units. Units are independent.
        usable = {name: tensor[keep_B] for name, tensor in batch.items()}
        _accumulate(unit_loss, usable, optimizer, hooks)


def _take(records: Records, index: Tensor) -> dict[str, Tensor]:
    return {name: tensor[index.to(tensor.device)] for name, tensor in records.items()}


def _train_without_privacy(
    module: nn.Module, unit_loss: UnitLoss, records: Records, mechanism: DpSgd, secret: bytes
) -> None:
    units = len(next(iter(records.values())))
    optimizer = torch.optim.SGD(module.parameters(), lr=mechanism.learning_rate)
    module.train()
    for step in range(mechanism.steps):
        chosen = poisson_sample(units, mechanism.sampling_rate, secret, step)
        optimizer.zero_grad()
        for part in chosen.split(mechanism.physical_batch):
            if len(part):
                (unit_loss(_take(records, part)).sum() / mechanism.divisor).backward()
        optimizer.step()
