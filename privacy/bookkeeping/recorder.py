"""The pass itself: record inputs going forward, take output gradients going backward, compute none for parameters."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from conclave.base.errors import BadInputError
from conclave.privacy.bookkeeping import refusals
from conclave.privacy.bookkeeping.certificate import Measured, squared_bounds
from conclave.privacy.bookkeeping.contributions import Contribution, merge
from conclave.privacy.bookkeeping.expanded import run_expanded
from conclave.privacy.bookkeeping.layers import Rule, own_parameters, rule_for, rules_by_row
from conclave.privacy.bookkeeping.ragged import Scratch, Segments
from conclave.privacy.bookkeeping.shared import Kept, widened
from conclave.privacy.bookkeeping.units import Units
from conclave.privacy.bookkeeping.uses import Expanded, Ruled, Use
from conclave.privacy.bookkeeping.weights import Weights


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


class Pass:
    """One forward pass: what it left for the backward passes through it."""

    def __init__(self, units: Units, scratch: Scratch) -> None:
        self.units, self._scratch = units, scratch
        self.uses: list[Use] = []
        self._kept: dict[int, Kept] = {}
        self._segments: dict[int, Segments] = {}

    def keep(self, x: Tensor) -> Kept:
        """Keep an input, once for all layers that see it."""
        kept = self._kept.get(id(x))
        if kept is None:
            kept = self._kept[id(x)] = Kept(x, self.units)
        return kept

    def hand_over(self) -> list[Use]:
        """Return the uses and release them: each input lives as long as somebody needs it."""
        uses, self.uses, self._kept = self.uses, [], {}
        return uses

    def segments(self, offsets_E: Tensor, example_N: Tensor) -> Segments:
        """Return the segments of a dispatch, once for all layers of it."""
        key = offsets_E.data_ptr()
        if key not in self._segments:
            self._segments[key] = Segments(offsets_E, self.units.of(example_N), self.units.count, self._scratch)
        return self._segments[key]


class _Found:
    """Collects contributions; a parameter used several times waits for all of them."""

    def __init__(self, uses: Sequence[Use]) -> None:
        self._times: Counter[Tensor] = Counter(p for use in uses for p in use.parameters)
        self._waiting: dict[Tensor, list[Contribution]] = {}
        self._found: dict[Tensor, Contribution] = {}
        self._measured: list[Measured] = []

    def take(self, parameter: Tensor, contribution: Contribution) -> None:
        """Take one contribution."""
        if self._times[parameter] == 1:
            self._settle(parameter, contribution)
        else:
            self._waiting.setdefault(parameter, []).append(contribution)

    def finish(self, trained: Sequence[Tensor], units: int) -> UnitGradients:
        """Combine what waited, and bound everything."""
        for parameter, contributions in self._waiting.items():
            self._settle(parameter, merge(contributions))
        return UnitGradients(trained, self._found, self._measured, units)

    def _settle(self, parameter: Tensor, contribution: Contribution) -> None:
        self._measured.append(contribution.measure())
        self._found[parameter] = contribution


class _Call(NamedTuple):
    """One run of a layer: its name, its own parameters by name, what it was given and what it returned."""

    name: str
    own: Mapping[str, Tensor]
    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    def inputs(self) -> list[Any]:
        """Return its arguments in the order of its forward pass's parameters, however they were passed."""
        if not self.kwargs:
            return list(self.args)
        return list(inspect.signature(self.layer.forward).bind(*self.args, **self.kwargs).arguments.values())


class Bookkeeper:
    """Finds per-unit gradients of a module's trained parameters in one backward pass.

    ``fallbacks`` names the layers that have no rule and get separate parameters per example: right, but slow.

    While a layer runs, its parameters take no part in the graph: its rule, or the expanded copies, stand for them. All
    other uses of a parameter do enter the graph, where :mod:`conclave.privacy.training.accounted` finds and refuses
    them.
    """

    def __init__(self, module: nn.Module) -> None:
        """Attach to ``module``; :meth:`close` leaves it as it was.

        Raises:
            BadInputError: a layer makes examples depend on each other, or has no gradients per unit.
        """
        refusals.check(module)
        self._trained: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
        self._pass: Pass | None = None
        self._repeating = False
        self._examples = 0
        self._scratch = Scratch()
        self.fallbacks: list[str] = []
        self._handles: list[RemovableHandle] = []
        for name, layer in module.named_modules():
            own = own_parameters(layer)
            if own:
                if rule_for(layer) is None:
                    self.fallbacks.append(f"{name} ({type(layer).__name__})")
                before, after = partial(self._before, list(own.values())), partial(self._after, name, own)
                self._handles.append(layer.register_forward_pre_hook(before))
                # Before the user's own hooks: the layer's output itself is wanted, not what they make of it.
                self._handles.append(layer.register_forward_hook(after, prepend=True, with_kwargs=True))

    def close(self) -> None:
        """Detach from the module."""
        for handle in self._handles:
            handle.remove()

    def forward(self, unit_loss: Callable[[], Tensor], units: Units) -> tuple[Tensor, Pass]:
        """Run the forward pass and record it.

        Args:
            unit_loss: returns the loss of each example, [B] or, for several tasks, [B, tasks].

        Raises:
            BadInputError: the loss has another shape; a layer does not keep the batch as its first axis.
            RuntimeError: products in reduced precision are switched on; a bound would not hold.
        """
        if torch.get_float32_matmul_precision() != "highest":
            raise RuntimeError("float32 products must not be shortened: torch.set_float32_matmul_precision('highest')")
        self._pass = state = Pass(units, self._scratch)
        try:
            loss_B = unit_loss()
        finally:
            self._pass = None
            self._switch_on()
        if loss_B.dim() not in (1, 2) or len(loss_B) != units.examples:
            raise BadInputError(
                f"the loss has shape {list(loss_B.shape)}, must be one value per example: [{units.examples}]"
            )
        return loss_B, state

    def backward(self, loss: Tensor, state: Pass, *, last: bool = True) -> UnitGradients:
        """Run a backward pass of a scalar loss, a sum over examples.

        Args:
            last: no further backward pass follows through the same forward pass.

        Raises:
            BadInputError: a rule leaves out a parameter of its layer.
            RuntimeError: a layer's input was changed in place after the layer had used it.
        """
        edges: Any = [edge for use in state.uses for edge in use.edges]
        deltas: list[Tensor | None] = [None] * len(edges)
        if loss.requires_grad and edges:
            self._repeating = True  # checkpointing runs layers again: they must do again what they did
            try:
                deltas = list(torch.autograd.grad(loss, edges, retain_graph=not last, allow_unused=True))
            finally:
                self._repeating = False
                self._switch_on()
        uses = state.hand_over() if last else list(state.uses)
        found = _Found(uses)
        while uses:  # from the last layer back, letting go of inputs and gradients on the way
            use = uses.pop()
            first = len(deltas) - len(use.edges)
            mine = deltas[first:]
            del deltas[first:]
            for parameter, contribution in use.contributions(mine, state):
                found.take(parameter, contribution)
        return found.finish(self._trained, state.units.count)

    def gradients(self, unit_loss: Callable[[], Tensor], units: Units) -> UnitGradients:
        """Forward and backward in one: the per-unit gradients of a loss with one value per example."""
        loss_B, state = self.forward(unit_loss, units)
        return self.backward(loss_B.sum(), state)

    def _switch_on(self) -> None:
        """Put back what a layer that was interrupted left."""
        for parameter in self._trained:
            parameter.requires_grad_(True)

    def _watching(self) -> bool:
        return (self._pass is not None or self._repeating) and torch.is_grad_enabled()

    def _before(self, own: Sequence[Tensor], layer: nn.Module, args: tuple[Any, ...]) -> None:
        if self._watching():
            for parameter in own:
                parameter.requires_grad_(False)

    def _after(
        self,
        name: str,
        own: Mapping[str, Tensor],
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        if not self._watching():
            return None
        for parameter in own.values():
            parameter.requires_grad_(True)
        call = _Call(name, own, layer, args, kwargs, output)
        inputs, rule = call.inputs(), rule_for(layer)
        if rule is not None and all(x is None or isinstance(x, Tensor) for x in inputs):
            return self._ruled(call, rule, [x for x in inputs if x is not None])
        if rule in rules_by_row:
            raise BadInputError(f"layer {name} ({type(layer).__name__}) must be given tensors only")
        return self._expanded(call)

    def _ruled(self, call: _Call, rule: Rule, tensors: Sequence[Tensor]) -> Tensor | None:
        name, layer, output = call.name, call.layer, call.output
        if not isinstance(output, Tensor) or not tensors:
            raise BadInputError(f"layer {name} ({type(layer).__name__}) must map tensors to one tensor")
        state = self._pass
        if state is not None and rule not in rules_by_row:
            _check_rows(name, layer, tensors[0], output, state.units.examples)
        replaced = None
        if not output.requires_grad:  # nothing before it is trained: the backward pass ends here
            # A sum, not the tensor itself: a leaf could not be changed in place by an activation that follows.
            output = replaced = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        if state is not None:
            # The edge is of this very output, whatever is done in place to it later.
            edge = get_gradient_edge(output)
            kept = [state.keep(x) for x in tensors]
            state.uses.append(Ruled(name, layer, list(call.own.values()), rule, kept, [edge]))
        return replaced

    def _expanded(self, call: _Call) -> Any:
        state = self._pass
        examples = self._examples if state is None else state.units.examples
        self._examples = examples
        named = f"layer {call.name or '(the model)'} ({type(call.layer).__name__})"
        try:
            output, copies = run_expanded(
                named, call.layer, list(call.own), call.args, call.kwargs, call.output, examples
            )
        except BadInputError:
            raise
        except Exception as error:  # of the layer's own code, of whatever kind
            if state is None:  # checkpointing ends a repeated pass by an exception, as soon as it has what it needs
                raise
            raise BadInputError(
                f"{named} cannot be run example by example ({type(error).__name__}), must keep examples apart without "
                "random numbers or branches on values; register a rule for it "
                "(conclave.privacy.bookkeeping.layers.register)"
            ) from error
        if state is not None:
            state.uses.append(Expanded(list(call.own.values()), copies))
        return output


def _check_rows(name: str, layer: nn.Module, x: Tensor, output: Tensor, examples: int) -> None:
    if not (x.dim() and output.dim()) or not len(x) == len(output) == examples:
        raise BadInputError(
            f"layer {name} ({type(layer).__name__}) saw {len(x) if x.dim() else 1} rows of {examples} examples: "
            "the batch must stay the first axis, or rows could not be told by unit"
        )
