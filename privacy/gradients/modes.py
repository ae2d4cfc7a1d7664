"""Ways to get clipped sums of per-unit gradients out of a physical batch.

* bookkeeping: one backward pass, certified norms (privacy/bookkeeping).
* hooks: Opacus materialises every unit's gradient; what is clipped is what is summed.
* ghost: Opacus's two backward passes; norms taken apart from the gradients, not certified.
* strict: every unit alone, its contribution rounded onto a public grid and summed in integers.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, Protocol

import torch
from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping
from torch import Tensor, nn

import conclave.privacy.gradients.per_unit  # noqa: F401  (registers our layers' samplers with Opacus)
from conclave.base.errors import BadInputError
from conclave.model.records import Records
from conclave.privacy.bookkeeping import Bookkeeper, Units
from conclave.privacy.bookkeeping.recorder import Pass
from conclave.privacy.bookkeeping.refusals import check
from conclave.privacy.gradients.clipping import ClipKind, clip_factors, unit_factors, usable

ExampleLoss = Callable[[Records], Tensor]
"""Maps a batch of B examples to B losses, or [B, tasks]; an example's loss depends on that example alone."""

GRID_BITS = 30


class Clipping(NamedTuple):
    """How a batch is clipped: the kind and the current bound."""

    kind: ClipKind
    clip: float


class ClippedSum(NamedTuple):
    """sums: one per trained parameter, float32 or wider; in mode strict int64, in units of ``clip·2^-30``.

    inside: Σ over usable units of ½ if the norm is within the bound, else −½. Private until it is noised.
    """

    sums: list[Tensor]
    inside: float


class GradientMode(Protocol):
    """One way of getting a clipped sum."""

    def clipped_sum(self, loss: ExampleLoss, batch: Records, units: Units, clipping: Clipping) -> ClippedSum:
        """Return the sum of a physical batch that has at least one unit."""

    def unwatched(self) -> AbstractContextManager[None]:
        """Within it, the mode ignores forward passes of the module."""

    def close(self) -> None:
        """Leave the module as it was."""


def mode_for(name: str, module: nn.Module) -> GradientMode:
    """Return the mode of that name, attached to a module.

    Raises:
        BadInputError: there is no such mode; the module holds a layer that cannot be made private.
    """
    modes: dict[str, Callable[[nn.Module], GradientMode]] = {
        "bookkeeping": Bookkeeping, "hooks": Hooks, "ghost": Ghost, "strict": Strict
    }  # fmt: skip
    if name not in modes:
        raise BadInputError(f"gradients is {name!r}, must be one of {', '.join(sorted(modes))}")
    return modes[name](module)


def trained(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained, in the module's order."""
    return [p for p in module.parameters() if p.requires_grad]


def _inside(squared_PU: Tensor, clip: float) -> float:
    norm_U = squared_PU.sum(0).sqrt()
    return float(torch.where(usable(norm_U), torch.where(norm_U <= clip, 0.5, -0.5), 0.0).sum())


class Bookkeeping:
    """See :mod:`conclave.privacy.bookkeeping`."""

    def __init__(self, module: nn.Module) -> None:
        self._bookkeeper = Bookkeeper(module)
        self._trained = trained(module)

    @property
    def fallbacks(self) -> list[str]:
        """Layers that are materialised because they have no rule."""
        return self._bookkeeper.fallbacks

    def clipped_sum(self, loss: ExampleLoss, batch: Records, units: Units, clipping: Clipping) -> ClippedSum:
        """One backward pass; with several tasks, one more for each."""
        loss_B, state = self._bookkeeper.forward(lambda: unit_mean(loss(batch), units), units)
        if loss_B.dim() == 2:
            loss_B = self._clip_tasks(loss_B, state, units, clipping)
        found = self._bookkeeper.backward(loss_B.sum(), state)
        if clipping.kind == "per-layer":
            factors = list(unit_factors(found.squared_bound_PU, clipping.kind, clipping.clip, len(self._trained)))
            sums = found.weighted_sums(factors)
        else:
            factor_PU = unit_factors(found.squared_bound_PU, clipping.kind, clipping.clip, len(self._trained))
            sums = found.weighted_sums(factor_PU[0] if len(factor_PU) else torch.zeros(units.count))
        return ClippedSum([sums[p] for p in self._trained], _inside(found.squared_bound_PU, clipping.clip))

    def _clip_tasks(self, loss_BK: Tensor, state: Pass, units: Units, clipping: Clipping) -> Tensor:
        """Scale each task's loss so that its gradient is within C/√tasks: the joint gradient is linear in it.

        Returns:
            The sum over tasks, [B]. An unusable task leaves its unit out as a whole: the joint norm is then NaN.
        """
        tasks = loss_BK.shape[1]
        total_B = torch.zeros_like(loss_BK[:, 0])
        for task in range(tasks):
            found = self._bookkeeper.backward(loss_BK[:, task].sum(), state, last=False)
            norm_U = found.squared_bound_PU.sum(0).sqrt()
            factor_U = clip_factors(norm_U, clipping.clip / tasks**0.5)
            factor_U = torch.where(usable(norm_U), factor_U, float("nan")).to(loss_BK.dtype)
            total_B = total_B + (factor_U if units.unit_B is None else factor_U[units.unit_B]) * loss_BK[:, task]
        return total_B

    def unwatched(self) -> AbstractContextManager[None]:
        """It looks at its own passes only."""
        return nullcontext()

    def close(self) -> None:
        """Detach."""
        self._bookkeeper.close()


def unit_mean(loss_B: Tensor, units: Units) -> Tensor:
    """Weigh a unit's examples so that its loss is their mean: it depends on that unit alone."""
    if units.unit_B is None:
        return loss_B
    size_U = torch.bincount(units.unit_B, minlength=units.count)
    weight_B = size_U[units.unit_B].to(loss_B.dtype).reciprocal()
    return loss_B * (weight_B if loss_B.dim() == 1 else weight_B[:, None])


class _OpacusMode(ABC):
    """What both Opacus modes do with its hooks, which keep what they have seen on module and parameters."""

    name: str

    def __init__(self, module: nn.Module) -> None:
        check(module, self.name)
        self._module = module
        self._trained = trained(module)
        self._hooks = self._attached()

    @abstractmethod
    def _attached(self) -> GradSampleHooks:
        """Attach Opacus's hooks."""

    @abstractmethod
    def _sum(self, loss: ExampleLoss, batch: Records, units: Units, clipping: Clipping) -> ClippedSum:
        """Return the clipped sum."""

    def clipped_sum(self, loss: ExampleLoss, batch: Records, units: Units, clipping: Clipping) -> ClippedSum:
        """Return the clipped sum. An interrupted pass leaves nothing that a later one would add."""
        self._forget()
        try:
            return self._sum(loss, batch, units, clipping)
        except BaseException as error:
            self.close()
            self._hooks = self._attached()
            if isinstance(error, RuntimeError) and "BackwardHookFunction" in str(error):
                raise BadInputError(
                    "what a layer returned is changed in place (an activation with inplace=True, say), which "
                    f"gradients {self.name!r} cannot see through; use inplace=False, or 'bookkeeping'"
                ) from error
            raise

    def _forget(self) -> None:
        """Forget layers that were called but had no part in the loss: Opacus would wait for them forever."""
        for layer in self._module.modules():
            vars(layer).pop("activations", None)
        for parameter in self._trained:
            vars(parameter)["_forward_counter"] = 0

    def _check_counted(self) -> None:
        """Refuse a parameter for which Opacus saw some uses and waits for others: its gradient would be left out."""
        for name, parameter in self._module.named_parameters():
            if "_current_grad_sample" in vars(parameter):
                raise BadInputError(
                    f"parameter {name} is used in a layer whose output has no part in the loss, which gradients "
                    f"{self.name!r} cannot tell; use 'bookkeeping'"
                )

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Opacus counts every forward pass it sees, and waits for its backward pass."""
        self._hooks.disable_hooks()
        try:
            with _quiet():
                yield
        finally:
            self._hooks.enable_hooks()

    def close(self) -> None:
        """Detach."""
        self._hooks.cleanup()
        for layer in self._module.modules():  # what cleanup leaves
            for name in ("activations", "max_batch_len"):
                vars(layer).pop(name, None)


class Hooks(_OpacusMode):
    """Opacus's per-sample hooks: any layer Opacus knows, memory for every unit's gradient."""

    name = "hooks"

    def _attached(self) -> GradSampleHooks:
        return GradSampleHooks(self._module, loss_reduction="sum")

    def _sum(self, loss: ExampleLoss, batch: Records, units: Units, clipping: Clipping) -> ClippedSum:
        """Materialise, take norms of what was materialised, sum in float64."""
        with _quiet():
            loss_B = _one_loss(unit_mean(loss(batch), units))
            if loss_B.requires_grad:
                loss_B.sum().backward()
        self._check_counted()
        gradients = []
        for parameter in self._trained:
            gradients.append(units.add_up(_joined(vars(parameter)["grad_sample"], parameter, units.examples)))
            vars(parameter)["grad_sample"] = None
            parameter.grad = None
        # One fused pass per parameter: the float64 copy of a unit's gradient is never made for its norm.
        norms = [torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64) for g in gradients]
        squared_PU = torch.stack(norms).square()
        factor_PU = unit_factors(squared_PU, clipping.kind, clipping.clip, len(self._trained))
        sums = [clipped_sum(g, factor_U) for g, factor_U in zip(gradients, factor_PU, strict=True)]
        return ClippedSum(sums, _inside(squared_PU, clipping.clip))


def _joined(grad_sample: Tensor | Sequence[Tensor] | None, parameter: Tensor, examples: int) -> Tensor:
    """Return the gradient of every example, [B, *shape]; zeros of a parameter that the loss does not depend on."""
    if grad_sample is None:
        return parameter.new_zeros(examples, *parameter.shape)
    gradient_B = grad_sample if isinstance(grad_sample, Tensor) else torch.stack(list(grad_sample)).sum(0)
    if len(gradient_B) != examples:
        raise BadInputError(
            f"a layer saw {len(gradient_B)} rows of {examples} examples: the batch must stay the first axis, or rows "
            "could not be told by unit"
        )
    return gradient_B


def clipped_sum(gradient_B: Tensor, factor_B: Tensor) -> Tensor:
    """Return Σ_b factor_b · gradient_b in float64, skipping units with factor 0 (they may hold NaN)."""
    keep_B = factor_B > 0.0
    return torch.einsum("b,b...->...", factor_B[keep_B], gradient_B[keep_B].double())


class SelectingGhostHooks(GradSampleHooksFastGradientClipping):  # type: ignore[misc]  # Opacus is untyped
    """Opacus's ghost clipping with our clip factors."""

    def squares(self) -> Tensor:
        """Return each unit's squared norm of the last backward pass, float64 [1, U]."""
        squared_1U: Tensor = self.get_norm_sample().double().square().unsqueeze(0)
        return squared_1U


class Ghost(_OpacusMode):
    """Opacus's ghost clipping: two backward passes; records as units, one bound for the whole gradient."""

    name = "ghost"

    def _attached(self) -> SelectingGhostHooks:
        return SelectingGhostHooks(self._module, loss_reduction="sum", max_grad_norm=1.0)

    def _sum(self, loss: ExampleLoss, batch: Records, units: Units, clipping: Clipping) -> ClippedSum:
        """Take norms in one backward pass and the weighted sum in another."""
        if units.unit_B is not None or clipping.kind == "per-layer":
            raise BadInputError("gradients 'ghost' knows records as units and clips them as a whole")
        try:
            with _quiet():
                return self._clipped_sum(loss, batch, clipping)
        except NotImplementedError as refusal:  # norms of several uses of one parameter do not add up
            raise BadInputError(
                "gradients 'ghost' cannot bound a parameter that is used several times, as by a policy router; "
                "use 'bookkeeping'"
            ) from refusal

    def _clipped_sum(self, loss: ExampleLoss, batch: Records, clipping: Clipping) -> ClippedSum:
        loss_B = _one_loss(loss(batch))
        for parameter in self._trained:  # one that the loss does not depend on is left so
            vars(parameter)["_norm_sample"] = torch.zeros(len(loss_B), dtype=parameter.dtype, device=parameter.device)
        if loss_B.requires_grad:
            loss_B.sum().backward(retain_graph=True)
        self._check_counted()
        squared_1U = self._hooks.squares()
        if squared_1U.shape[1] != len(loss_B):
            raise BadInputError(
                f"layers saw {squared_1U.shape[1]} rows of {len(loss_B)} examples: the batch must stay the first axis, "
                "or rows could not be told by unit"
            )
        factor_U = unit_factors(squared_1U, clipping.kind, clipping.clip, 1)[0]
        inside = _inside(squared_1U, clipping.clip)
        self._clear()
        keep_U = factor_U > 0.0
        if bool(keep_U.all()):
            if loss_B.requires_grad:
                with self.unwatched():
                    (factor_U.to(loss_B.dtype) * loss_B).sum().backward()
            sums = [_dense(p.grad, p) for p in self._trained]
            self._clear()
            return ClippedSum(sums, inside)
        if not bool(keep_U.any()):
            return ClippedSum([torch.zeros_like(p) for p in self._trained], inside)
        # 0·inf is NaN in a backward pass: run again without the unusable units. Units are independent.
        kept = {name: tensor[keep_U] for name, tensor in batch.items()}
        return self._clipped_sum(loss, kept, clipping)._replace(inside=inside)

    def _clear(self) -> None:
        for parameter in self._trained:
            parameter.grad = None


class Strict:
    """Every unit alone: no bit of its contribution depends on who else is in the batch.

    A clipped contribution is rounded toward zero onto the grid ``clip·2^-30`` and summed in int64, so it can only get
    smaller, and sums have no rounding that crafted weights could amplify.
    """

    def __init__(self, module: nn.Module) -> None:
        check(module, "strict")
        self._trained = trained(module)

    def clipped_sum(self, loss: ExampleLoss, batch: Records, units: Units, clipping: Clipping) -> ClippedSum:
        """Run unit by unit."""
        sums = [torch.zeros_like(p, dtype=torch.int64) for p in self._trained]
        unit_B = torch.arange(units.examples) if units.unit_B is None else units.unit_B.cpu()
        inside = 0.0
        for unit in range(units.count):
            mine_B = unit_B == unit
            alone = {name: tensor[mine_B.to(tensor.device)] for name, tensor in batch.items()}
            gradients = self._gradients(loss, alone)
            norms = [torch.linalg.vector_norm(g, dtype=torch.float64).reshape(1) for g in gradients]
            squared_P1 = torch.stack(norms).square()
            factor_P = unit_factors(squared_P1, clipping.kind, clipping.clip, len(self._trained))[:, 0]
            inside += _inside(squared_P1, clipping.clip)
            if bool(usable(squared_P1.sum().sqrt())):
                for total, gradient, factor in zip(sums, gradients, factor_P, strict=True):
                    total += (gradient.double() * (factor * 2.0**GRID_BITS / clipping.clip)).trunc().to(torch.int64)
        return ClippedSum(sums, inside)

    def _gradients(self, loss: ExampleLoss, alone: Records) -> list[Tensor]:
        mean = _one_loss(loss(alone)).mean()
        if not mean.requires_grad:
            return [torch.zeros_like(p) for p in self._trained]
        found = torch.autograd.grad(mean, self._trained, allow_unused=True)
        return [_dense(g, p) for p, g in zip(self._trained, found, strict=True)]

    def unwatched(self) -> AbstractContextManager[None]:
        """It looks at its own passes only."""
        return nullcontext()

    def close(self) -> None:
        """Nothing was attached."""


def _dense(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    """Return what autograd found, zeros if it found nothing; for a table it may have found single rows."""
    if gradient is None:
        return torch.zeros_like(parameter)
    return gradient.to_dense() if gradient.is_sparse else gradient


def _one_loss(loss_B: Tensor) -> Tensor:
    if loss_B.dim() != 1:
        raise BadInputError("losses of several tasks need gradients 'bookkeeping' and numeric 'fast'")
    return loss_B


@contextmanager
def _quiet() -> Iterator[None]:
    """The first layer's input needs no gradient, which torch remarks on at every backward pass of a hooked module."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
        yield
