"""The pass itself: record inputs going forward, take output gradients going backward, none for parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from model.errors import BadInputError
from privacy.bookkeeping import refusals
from privacy.bookkeeping.certificate import Measured, squared_bounds
from privacy.bookkeeping.contributions import Contribution, merge
from privacy.bookkeeping.kept import Kept, widened
from privacy.bookkeeping.layers import Rule, fallback, rule_for, rules_by_row, wanted
from privacy.bookkeeping.ragged import Segments
from privacy.bookkeeping.units import Units
from privacy.bookkeeping.weights import Weights


class UnitGradients:
    """What one pass found: of each parameter, the gradient of every unit.

    squared_bound_PU: certified upper bounds of squared norms, float64, a row per parameter in ``reached``.
    reached: the parameters that any unit may have reached.
    """

    def __init__(
        self,
        trained: Sequence[Tensor],
        found: Mapping[Tensor, Contribution],
        measured: Sequence[Measured],
        units: int,
    ) -> None:
        self._trained, self._found = trained, found
        self.reached = list(found)
        self.squared_bound_PU = squared_bounds(measured) if measured else torch.zeros(0, units, dtype=torch.float64)

    def weighted_sums(self, factors_U: Tensor | Sequence[Tensor]) -> dict[Tensor, Tensor]:
        """Return Σ_u factor_u · g_u of every trained parameter, zeros for one that no unit reached.

        Args:
            factors_U: float64 [U], 0 for a unit to leave out; or one such tensor per row of ``squared_bound_PU``.
        """
        if isinstance(factors_U, Tensor):
            weights = [Weights.of(factors_U)] * len(self._found)
        else:
            weights = [Weights.of(factor_U) for factor_U in factors_U]
        sums = {
            parameter: contribution.weighted(weight)
            for (parameter, contribution), weight in zip(self._found.items(), weights, strict=True)
        }
        return {p: sums[p] if p in sums else torch.zeros_like(p, dtype=widened(p).dtype) for p in self._trained}

    def per_unit(self) -> dict[Tensor, Tensor]:
        """Return every unit's gradient of the parameters reached, [U, *shape]. Large: for checks."""
        return {parameter: contribution.per_unit() for parameter, contribution in self._found.items()}


class _Pass:
    """State of one forward pass and the backward passes through it; answers what rules ask."""

    def __init__(self, units: Units) -> None:
        self.units = units
        self.entries: list[GradientEdge] = []
        self.uses: Counter[Tensor] = Counter()
        self.keeps_inputs = False
        self._kept: dict[int, Kept] = {}
        self._segments: dict[int, Segments] = {}
        self.restart()

    def restart(self) -> None:
        """Forget what a backward pass found."""
        self._waiting: dict[Tensor, list[Contribution]] = {}
        self._found: dict[Tensor, Contribution] = {}
        self._measured: list[Measured] = []

    def keep(self, x: Tensor) -> Kept:
        """Keep an input, once for all layers that see it."""
        kept = self._kept.get(id(x))
        if kept is None:
            kept = self._kept[id(x)] = Kept(x, self.units)
        kept.users += 1
        return kept

    def release(self, inputs: Iterable[Kept]) -> None:
        """Forget inputs that no layer will ask for any more."""
        for kept in inputs:
            kept.users -= 1
            if kept.users == 0 and not self.keeps_inputs:
                self._kept = {key: other for key, other in self._kept.items() if other is not kept}

    def segments(self, offsets_E: Tensor, example_N: Tensor) -> Segments:
        """Return the segments of a dispatch, once for all layers of it."""
        key = offsets_E.data_ptr()
        if key not in self._segments:
            self._segments[key] = Segments(offsets_E, self.units.of(example_N), self.units.count)
        return self._segments[key]

    def take(self, parameter: Tensor, contribution: Contribution) -> None:
        """Take a contribution; a parameter used several times waits for all of them."""
        if self.uses[parameter] == 1:
            self._settle(parameter, contribution)
        else:
            self._waiting.setdefault(parameter, []).append(contribution)

    def finish(self, trained: Sequence[Tensor]) -> UnitGradients:
        """Combine what waited and bound everything."""
        for parameter, uses in self._waiting.items():
            self._settle(parameter, merge(uses))
        return UnitGradients(trained, self._found, self._measured, self.units.count)

    def _settle(self, parameter: Tensor, contribution: Contribution) -> None:
        self._measured.append(contribution.measure())
        self._found[parameter] = contribution


class Bookkeeper:
    """Finds per-unit gradients of a module's trained parameters in one backward pass.

    ``fallbacks`` names the layers that have no rule and are materialised by Opacus, unit by unit: right, but slow.
    """

    def __init__(self, module: nn.Module) -> None:
        """Look at ``module``, which is not changed; hooks are attached for the length of a pass only.

        Raises:
            BadInputError: a layer makes examples depend on each other, or cannot be told by unit.
        """
        refusals.check(module)
        self._trained = [p for p in module.parameters() if p.requires_grad]
        self._layers: list[tuple[str, nn.Module, Rule]] = []
        self.fallbacks: list[str] = []
        for name, layer in module.named_modules():
            if any(wanted(p) for p in layer.parameters(recurse=False)):
                rule = rule_for(layer)
                if rule is None:
                    self.fallbacks.append(f"{name} ({type(layer).__name__})")
                self._layers.append((name, layer, rule or fallback))

    def forward(self, unit_loss: Callable[[], Tensor], units: Units) -> tuple[Tensor, _Pass]:
        """Run the forward pass and record it.

        Args:
            unit_loss: returns the loss of each example, [B] or, for several tasks, [B, tasks].

        Raises:
            BadInputError: the loss has another shape; a layer does not keep the batch as its first axis.
            RuntimeError: products in reduced precision are switched on; a bound would not hold.
        """
        _check_precision()
        state = _Pass(units)
        with self._recording(state):
            loss_B = unit_loss()
        if loss_B.dim() not in (1, 2) or len(loss_B) != units.examples:
            raise BadInputError(
                f"the loss has shape {list(loss_B.shape)}, must be one value per example: [{units.examples}]"
            )
        return loss_B, state

    def backward(self, loss: Tensor, state: _Pass, *, last: bool = True) -> UnitGradients:
        """Run a backward pass of a scalar loss, a sum over examples.

        Args:
            last: no further backward pass follows through the same forward pass.
        """
        state.restart()
        state.keeps_inputs = not last
        if loss.requires_grad and state.entries:
            torch.autograd.grad(loss, state.entries, retain_graph=not last, allow_unused=True)
        return state.finish(self._trained)

    def gradients(self, unit_loss: Callable[[], Tensor], units: Units) -> UnitGradients:
        """Forward and backward in one: the per-unit gradients of a loss with one value per example."""
        loss_B, state = self.forward(unit_loss, units)
        return self.backward(loss_B.sum(), state)

    @contextmanager
    def _recording(self, state: _Pass) -> Iterator[None]:
        handles = [
            layer.register_forward_hook(partial(self._on_forward, state, name, rule))
            for name, layer, rule in self._layers
        ]
        for parameter in self._trained:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in self._trained:
                parameter.requires_grad_(True)
            for handle in handles:
                handle.remove()

    def _on_forward(
        self, state: _Pass, name: str, rule: Rule, layer: nn.Module, inputs: tuple[object, ...], output: Tensor
    ) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if not isinstance(output, Tensor) or not tensors:
            raise BadInputError(f"layer {name} ({type(layer).__name__}) must map tensors to one tensor")
        if rule not in rules_by_row and not len(tensors[0]) == len(output) == state.units.examples:
            raise BadInputError(
                f"layer {name} ({type(layer).__name__}) saw {len(tensors[0])} rows of {state.units.examples} examples: "
                "the batch must stay the first axis, or rows could not be told by unit"
            )
        replaced = None
        if not output.requires_grad:  # nothing before it is trained: the backward pass ends here
            # A sum, not the tensor itself: a leaf could not be changed in place by an activation that follows.
            output = replaced = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
            state.entries.append(get_gradient_edge(output))
        for parameter in layer.parameters(recurse=False):
            state.uses[parameter] += 1
        kept = [state.keep(x) for x in tensors]
        output.register_hook(partial(_on_backward, state, name, rule, layer, kept))
        return replaced


def _on_backward(state: _Pass, name: str, rule: Rule, layer: nn.Module, kept: list[Kept], delta: Tensor) -> None:
    if not all(x.unchanged() for x in kept):
        raise RuntimeError(f"the input of layer {name} was changed in place afterwards; write x = x + y, not x += y")
    for parameter, contribution in rule(layer, kept, widened(delta), state):
        state.take(parameter, contribution)
    state.release(kept)


def _check_precision() -> None:
    if torch.get_float32_matmul_precision() != "highest":
        raise RuntimeError("float32 products must not be shortened: torch.set_float32_matmul_precision('highest')")
