"""From clipped sums to a step: noise for every parameter, the public divisor, and the optimizer's update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.optimizers import DPOptimizer
from torch import Tensor

from conclave.privacy.gradients.modes import GRID_BITS
from conclave.privacy.randomness import derive, standard_normal
from conclave.privacy.training.dpsgd_mechanism import DpSgd
from conclave.privacy.training.local_optimizers import NoiseCorrectedAdam
from conclave.privacy.training.noise_ahead import NoiseAhead, SharedWork, worth_a_thread

_CHUNK = 1 << 16  # values that stay in the cache while noise is added to them


class UnitDPOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus is untyped
    """Opacus's optimizer with our own sums, a declared divisor and the node's own noise.

    Call :meth:`accumulate` for each physical batch, any number of times including zero, then :meth:`noisy_step` once.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, mechanism: DpSgd) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=mechanism.gradient_noise_multiplier,
            max_grad_norm=mechanism.clip,
            expected_batch_size=mechanism.divisor,
            loss_reduction="sum",
        )
        self.noise_secret: bytes | None = None
        self._ahead: tuple[bytes, NoiseAhead] | None = None
        self._most_ahead = mechanism.memory_bytes // 4
        self._on_grid = mechanism.numeric == "strict"
        self._sums: list[Tensor | None] = [None] * len(self.params)

    def accumulate(self, parameters: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
        """Add a physical batch; the first is kept as it is, from the second on sums are float64 (or integers)."""
        place = {id(parameter): number for number, parameter in enumerate(self.params)}
        for parameter, total in zip(parameters, sums, strict=True):
            number = place[id(parameter)]
            before = self._sums[number]
            if before is None:
                self._sums[number] = total
            else:
                self._sums[number] = before + total if self._on_grid else before.double() + total.double()

    def take_sums(self) -> list[Tensor]:
        """Return the accumulated sums, float64, before any noise, and start anew: for audits. Never release them."""
        sums = [
            torch.zeros_like(p, dtype=torch.float64) if total is None else total.double() * self._unit
            for p, total in zip(self.params, self._sums, strict=True)
        ]
        self.forget_sums()
        return sums

    def forget_sums(self) -> None:
        """Start anew."""
        self._sums = [None] * len(self.params)

    def add_noise(self) -> None:
        """Set ``p.grad`` to the sum plus noise, for every parameter, whether or not a unit reached it."""
        if self.noise_secret is None:
            raise RuntimeError("a step needs a noise secret of its own")
        secret, ahead = self._ahead or (None, None)
        shared: list[Callable[[], None]] = []
        for number, (parameter, total) in enumerate(zip(self.params, self._sums, strict=True)):
            drawn = ahead is not None and secret == self.noise_secret and number < len(ahead)
            if ahead is not None and drawn:
                noise = ahead.take(number)
            else:
                noise = standard_normal(derive(self.noise_secret, number), parameter.numel())
                self._scale(noise.numpy())
            parameter.grad = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            calls = self._to_gradient(parameter.grad.view(-1), noise.to(parameter.device), total)
            if drawn and parameter.device.type == "cpu":
                shared += calls
            else:
                for call in calls:
                    call()
        if shared:
            SharedWork(shared).finish()
        self.forget_sums()
        self.noise_secret = None  # noise is used once

    @property
    def _unit(self) -> float:
        return self.max_grad_norm * 2.0**-GRID_BITS if self._on_grid else 1.0

    def _scale(self, noise_N: NDArray[np.float64]) -> None:
        noise_N *= self.noise_multiplier * self.max_grad_norm / self._unit
        if self._on_grid:  # rounded to whole steps of the sum's grid: sum and noise together are then exact integers
            np.rint(noise_N, out=noise_N)

    def _to_gradient(self, gradient_N: Tensor, noise_N: Tensor, total: Tensor | None) -> Iterator[Callable[[], None]]:
        """Yield calls that each set some of the gradient to noise plus sum, over the divisor."""
        total_N = None if total is None else total.reshape(-1)
        size = _CHUNK if gradient_N.device.type == "cpu" else max(1, len(noise_N))
        for start in range(0, len(noise_N), size):
            part = slice(start, start + size)
            summed = None if total_N is None else total_N[part]
            yield partial(_set, gradient_N[part], noise_N[part], summed, self._unit / self.expected_batch_size)

    @contextmanager
    def drawing_ahead(self, noise_secret: bytes) -> Iterator[None]:
        """Draw the noise of the enclosed step while its gradient is computed, if a core is free for that."""
        wanted = [(derive(noise_secret, number), p.numel()) for number, p in enumerate(self.params)]
        if not worth_a_thread(sum(count for _, count in wanted)):
            yield
            return
        with NoiseAhead(wanted, self._most_ahead, self._scale) as ahead:
            self._ahead = noise_secret, ahead
            try:
                yield
            finally:
                self._ahead = None

    def noisy_step(self, noise_secret: bytes) -> None:
        """Noise the accumulated sums with a secret used for this step only, and take the step."""
        self.noise_secret = noise_secret
        self.add_noise()
        if isinstance(self.original_optimizer, NoiseCorrectedAdam):
            std = self.noise_multiplier * self.max_grad_norm / self.expected_batch_size
            for group in self.original_optimizer.param_groups:
                group["noise_variance"] = std**2
        self.original_optimizer.step()
        self.original_optimizer.zero_grad()


def _set(gradient_N: Tensor, noise_N: Tensor, total_N: Tensor | None, factor: float) -> None:
    """Set to ``(noise + total) · factor`` in float64, rounded once to what the gradient holds."""
    noisy = noise_N if total_N is None else total_N.to(torch.float64, copy=True).add_(noise_N)
    gradient_N.copy_(noisy.mul_(factor))
