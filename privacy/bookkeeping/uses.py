"""One call of a layer: what was kept of it, and its parameters' gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from conclave.base.errors import BadInputError
from conclave.privacy.bookkeeping.contributions import Contribution, PerUnit
from conclave.privacy.bookkeeping.layers import Passing, Rule
from conclave.privacy.bookkeeping.shared import Kept, widened


class Use(Protocol):
    """A call, between its forward and its backward pass.

    parameters: those of the layer that are trained. edges: where the backward pass is to bring a gradient.
    """

    parameters: Sequence[Tensor]
    edges: Sequence[GradientEdge | Tensor]

    def contributions(self, deltas: Sequence[Tensor | None], step: Passing) -> Iterator[tuple[Tensor, Contribution]]:
        """Return the per-unit gradients, given the gradient at each edge; None if the loss does not depend on it."""


@dataclass
class Ruled:
    """A call of a layer with a rule: its inputs, and the gradient of its output."""

    name: str
    layer: nn.Module
    parameters: Sequence[Tensor]
    rule: Rule
    inputs: list[Kept]
    edges: Sequence[GradientEdge | Tensor]

    def contributions(self, deltas: Sequence[Tensor | None], step: Passing) -> Iterator[tuple[Tensor, Contribution]]:
        """Apply the rule.

        Raises:
            BadInputError: the rule leaves out a parameter of the layer.
            RuntimeError: an input was changed in place after the layer had used it.
        """
        (delta,) = deltas
        if delta is None:
            return
        if not all(kept.unchanged() for kept in self.inputs):
            raise RuntimeError(f"the input of layer {self.name} was changed in place afterwards; copy it first")
        left_out = set(map(id, self.parameters))
        for parameter, contribution in self.rule(self.layer, self.inputs, widened(delta), step):
            left_out.discard(id(parameter))
            yield parameter, contribution
        if left_out:
            kind = type(self.layer).__name__
            raise BadInputError(
                f"the rule for layer {self.name} ({kind}) leaves out a trained parameter, must tell all"
            )


@dataclass
class Expanded:
    """A call with parameters of each example's own."""

    parameters: Sequence[Tensor]
    edges: Sequence[GradientEdge | Tensor]

    def contributions(self, deltas: Sequence[Tensor | None], step: Passing) -> Iterator[tuple[Tensor, Contribution]]:
        """Add up the gradients of a unit's examples."""
        for parameter, gradient_B in zip(self.parameters, deltas, strict=True):
            if gradient_B is not None:
                yield parameter, PerUnit(step.units.add_up(widened(gradient_B)))
