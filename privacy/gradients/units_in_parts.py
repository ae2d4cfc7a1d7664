"""The clipped gradient of a unit that is too large to be processed at once: a group of many records.

Its records' gradients are added up over the parts, in float64, and only their sum is clipped: a unit is never split
before clipping. What is clipped is what is summed, so the norm that it is clipped by needs no further certificate
beyond rounding in float64, which the margin of the clip bound covers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from conclave.base.errors import BadInputError
from conclave.privacy.gradients.clipping import clip_factors, unit_factors, usable
from conclave.privacy.gradients.modes import GRID_BITS, ClippedSum, Clipping


class UnitInParts:
    """Adds up the gradients of one unit's parts. Each part is run alone, by plain automatic differentiation."""

    def __init__(self, trained: Sequence[Tensor], unit_size: int) -> None:
        """Begin a unit of ``unit_size`` examples, whose loss is the mean of theirs."""
        self._trained, self._size = list(trained), unit_size
        self._tasks: list[list[Tensor]] = []
        self._left_out = False

    def leave_out(self) -> None:
        """Let the unit contribute nothing, whatever its other parts are."""
        self._left_out = True

    def add(self, loss: Tensor, *, several_tasks: bool) -> None:
        """Add a part's gradients.

        Args:
            loss: of the part's examples, [B], or [B, tasks] where ``several_tasks`` can be clipped.

        Raises:
            BadInputError: the loss has several tasks, and must not.
        """
        if loss.dim() not in (1, 2 if several_tasks else 1):
            raise BadInputError("losses of several tasks need gradients 'bookkeeping' and numeric 'fast'")
        loss_BK = loss if loss.dim() == 2 else loss.unsqueeze(1)
        if not self._tasks:
            self._tasks = [
                [torch.zeros_like(p, dtype=torch.float64) for p in self._trained] for _ in range(loss_BK.shape[1])
            ]
        for number, sums in enumerate(self._tasks):
            total = loss_BK[:, number].sum() / self._size
            if not total.requires_grad:
                continue
            more = number + 1 < len(self._tasks)
            found = torch.autograd.grad(total, self._trained, allow_unused=True, retain_graph=more)
            for into, gradient in zip(sums, found, strict=True):
                if gradient is not None:
                    into += gradient

    def clipped(self, clipping: Clipping, *, on_grid: bool) -> ClippedSum:
        """Return the unit's contribution.

        Args:
            on_grid: round it toward zero onto the grid of integers, as at numeric level strict.
        """
        if self._left_out or not self._tasks:
            return self._nothing(on_grid)
        gradients, fine = self._joint(clipping)
        squared_P1 = torch.stack([torch.linalg.vector_norm(g).reshape(1) for g in gradients]).square()
        norm = squared_P1.sum().sqrt()
        if not (fine and bool(usable(norm))):  # by selection: 0·inf is NaN
            return self._nothing(on_grid)
        factor_P = unit_factors(squared_P1, clipping.kind, clipping.clip, len(self._trained))[:, 0]
        inside = 0.5 if float(norm) <= clipping.clip else -0.5
        if not on_grid:
            return ClippedSum([g.mul_(factor) for g, factor in zip(gradients, factor_P, strict=True)], inside)
        scale_P = factor_P * 2.0**GRID_BITS / clipping.clip
        return ClippedSum(
            [g.mul_(scale).trunc_().to(torch.int64) for g, scale in zip(gradients, scale_P, strict=True)], inside
        )

    def _nothing(self, on_grid: bool) -> ClippedSum:
        kind = torch.int64 if on_grid else torch.float64
        return ClippedSum([torch.zeros_like(p, dtype=kind) for p in self._trained], 0.0)

    def _joint(self, clipping: Clipping) -> tuple[list[Tensor], bool]:
        """Return the gradient of all tasks together, each clipped to C/√tasks, and whether every task is usable."""
        if len(self._tasks) == 1:
            return self._tasks[0], True
        joint, fine = [torch.zeros_like(p, dtype=torch.float64) for p in self._trained], True
        for gradients in self._tasks:
            norm = torch.stack([torch.linalg.vector_norm(g) for g in gradients]).norm()
            fine = fine and bool(usable(norm))
            factor = clip_factors(norm, clipping.clip / len(self._tasks) ** 0.5)
            for into, gradient in zip(joint, gradients, strict=True):
                into += gradient * factor
        return joint, fine
