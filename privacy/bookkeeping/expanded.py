"""A layer without a rule: every example gets its own parameters, and autograd computes each one's gradient.

The layer's own forward pass runs once more, example by example (``torch.func.vmap``), with every parameter expanded
along the batch. What it was called with, numbers, keywords and several tensors, is what it sees; the attributes it has
at that moment are the ones it uses. Nothing is copied, and nothing stays on the layer.

Right for any layer that keeps the batch first, but slow, and memory for every example's gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from conclave.base.errors import BadInputError
from conclave.privacy.bookkeeping.shared import widened


class _WithoutHooks(nn.Module):
    """Calls a layer's forward pass without its hooks, which belong to the call that is already going on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer.forward(*args, **kwargs)


def run_expanded(
    named: str,
    layer: nn.Module,
    keys: Sequence[str],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: Any,
    examples: int,
) -> tuple[Any, list[Tensor]]:
    """Run a layer with parameters expanded to [examples, *shape].

    Args:
        named: the layer, for messages.
        keys: its parameters of its own that are trained.
        output: what the layer returned; what this function returns has the same structure and shapes.

    Returns:
        The output, and the expanded parameters: leaves of its graph, whose gradients are those of every example.

    Raises:
        BadInputError: a tensor among inputs or outputs does not have the batch as its first axis.
        Exception: the layer cannot be run example by example, because it draws random numbers, say.
    """
    inputs, structure = tree_flatten((args, dict(kwargs)))
    places = [place for place, x in enumerate(inputs) if isinstance(x, Tensor)]
    batched = [_is_batched(named, inputs[place], examples) for place in places]
    copies = [layer.get_parameter(key).detach() for key in keys]
    copies = [p.expand(examples, *p.shape).requires_grad_() for p in copies]
    body = _WithoutHooks(layer)

    def one(parameters: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
        filled = list(inputs)
        for place, x, has_batch in zip(places, tensors, batched, strict=True):
            filled[place] = x.unsqueeze(0) if has_batch else x
        args, kwargs = tree_unflatten(filled, structure)
        state = {f"layer.{key}": p for key, p in zip(keys, parameters, strict=True)}
        return _tensors(torch.func.functional_call(body, state, args, kwargs))

    dims = (0, [0 if has_batch else None for has_batch in batched])
    tensors = [inputs[place] for place in places]
    device = copies[0].device.type
    mixed = torch.is_autocast_enabled(device)
    if mixed:  # which does not reach into vmap: in float32 instead, and the output in its own type again
        tensors = [widened(x) for x in tensors]
    with warnings.catch_warnings(), torch.autocast(device, enabled=False) if mixed else nullcontext():
        warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
        found = torch.func.vmap(one, in_dims=dims)(copies, tensors)
    return _in_place_of(named, output, found, examples), copies


def _is_batched(named: str, x: Tensor, examples: int) -> bool:
    """Whether an input has a row for each example; a scalar, or a single row, is the same for all."""
    if x.dim() and len(x) == examples:
        return True
    if not x.dim() or len(x) == 1:
        return False
    raise BadInputError(
        f"{named} was given a tensor of shape {list(x.shape)} for {examples} examples: the batch must be the first "
        "axis of what a layer is given; expand it to the batch, or keep it as an attribute"
    )


def _tensors(output: Any) -> list[Tensor]:
    return [x for x in _leaves(output) if isinstance(x, Tensor)]


def _leaves(output: Any) -> Iterable[Any]:
    return tree_flatten(output)[0]


def _in_place_of(named: str, output: Any, found: Sequence[Tensor], examples: int) -> Any:
    """Put what was found for each example, [examples, 1, …], where the tensors of ``output`` are."""
    leaves, structure = tree_flatten(output)
    rest = iter(found)
    for place, was in enumerate(leaves):
        if isinstance(was, Tensor):
            now = next(rest, None)
            if now is None or was.shape[:1] != (examples,) or now.shape != (examples, 1, *was.shape[1:]):
                raise BadInputError(
                    f"{named} returned a tensor of shape {list(was.shape)} for {examples} examples: the batch must be "
                    "the first axis of what a layer returns"
                )
            leaves[place] = now.squeeze(1).to(was.dtype)
    if next(rest, None) is not None or not found:
        raise BadInputError(f"{named} must return tensors, the same number for one example as for many")
    return tree_unflatten(leaves, structure)
