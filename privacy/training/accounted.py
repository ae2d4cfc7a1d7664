"""Whether every trained parameter's gradient is accounted for: what a mode sums is all there is.

Modes derive per-unit gradients from what they see of layers. A weight used outside its layer, or a layer that is
read wrongly, would get noise and no gradient, or a wrong one, and nobody would notice: what is clipped is what is
summed, so nothing leaks, but nothing is learned either. So a trainer asks once, before its first step:

1. *Structure.* In the graph of a forward pass a trained parameter may only be reached through the layers that
   are watched. This finds a use however little it matters: a tied table used as ``x @ embed.weight.T``, a weight that a
   hook computed, a penalty on weights within the loss, a checkpoint that hides its layers.
2. *Sum.* The unclipped sum of the units' gradients that the mode gives must be autograd's gradient of the same
   batch, parameter by parameter.

Both run on made-up examples: numbers from a fixed public seed in the shapes and types of the records. Nothing that is
refused, or said, depends on a record's value, so a refusal may leave a node, and the same question can be asked where a
plan is admitted. Where a loss cannot be computed on such examples (it wants lengths above 0, say), the first records
themselves are run and only the structure is checked: then the outcome depends on the model's own branches alone.
The same is done if only the records' owner sees the outcome.

Nothing changes: module attributes, buffers and torch's generator are put back after every pass, and draws of random
layers come from this check's own stream. A passed check is not a proof: made-up examples may not reach a branch.

It costs about as much as a step of a small batch, once (:mod:`conclave.privacy.training.accounted_once`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from conclave.base.errors import BadInputError
from conclave.model.layers.unit_random import drawing_from
from conclave.model.records import Records
from conclave.privacy.bookkeeping import Bookkeeper, Units
from conclave.privacy.gradients.clipping import LARGEST_NORM
from conclave.privacy.gradients.modes import Clipping, ExampleLoss, GradientMode, Strict, trained
from conclave.privacy.training.accounted_once import is_answered, note_answer, question

EXAMPLES = 2
_OTHER_EXAMPLES = 3
"""The structure is looked at in another size, so that an axis that is no batch cannot be one by chance in both."""

_TOLERANCE, _HALF_TOLERANCE, _HALF_PARAMETER_TOLERANCE = 5e-4, 0.05, 0.25
"""Of a gradient's own size; where anything was computed at half precision (an honest model under autocast is off by
1 %); where the parameter itself is."""
_FLOOR = 0.02
"""Beside the whole gradient, what is that much smaller than the tolerance is rounding: a key's bias has gradient 0."""


def check_accounted(
    mode: GradientMode, module: nn.Module, loss: ExampleLoss, records: Records, *, among_owners: bool = False
) -> None:
    """Refuse a model of which a mode does not see every gradient.

    Args:
        mode: attached to ``module``.
        records: named tensors; shapes and types are used, values only where made-up ones cannot be run.
        among_owners: whoever sees a refusal may see the records: then the structure is looked at with the first of
            them too, which may take another branch.

    Raises:
        BadInputError: names the parameter and what to do.
    """
    asked = question(type(mode), module, loss, records)
    if is_answered(module, asked):
        return
    _check(mode, module, loss, records, among_owners)
    note_answer(module, asked)


def _check(
    mode: GradientMode, module: nn.Module, loss: ExampleLoss, records: Records, among_owners: bool = False
) -> None:
    could_run = any(_check_made_up(mode, module, loss, records, whole) for whole in ((0, 1), (0,)))
    first = {name: tensor[:_OTHER_EXAMPLES] for name, tensor in records.items()}
    if len(next(iter(first.values()))) and (among_owners or not could_run):
        with _undisturbed(module), mode.unwatched():
            try:
                _run(loss, first)
            except Exception:  # a loss of batches of one size alone: only that of the step itself can be run
                return
            _check_structure(mode, module, loss, first)


def _check_made_up(
    mode: GradientMode, module: nn.Module, loss: ExampleLoss, records: Records, whole: tuple[int, ...]
) -> bool:
    """Return whether a loss could be computed on made-up examples."""
    batch, other = (_made_up(records, examples, whole) for examples in (EXAMPLES, _OTHER_EXAMPLES))
    with _undisturbed(module), mode.unwatched():
        try:
            loss_B = _run(loss, batch)
        except Exception:  # the user's own code, on values it may not expect
            return False
        if not loss_B.requires_grad:
            raise BadInputError("the loss does not depend on any trained parameter, must be differentiable in them")
        _check_nodes(loss_B)
        truth = _gradients(module, loss_B)
        tolerance = _tolerance(loss_B)
        del loss_B
    with _undisturbed(module), mode.unwatched():
        _check_structure(mode, module, loss, other)
    if not isinstance(mode, Strict):  # its sums are autograd's
        with _undisturbed(module):
            _check_sum(mode, module, loss, batch, truth, tolerance)
    return True


def check_unchanged(module: nn.Module, attached: Sequence[Tensor]) -> None:
    """Refuse a module that no longer trains the parameters it had when training was attached.

    Raises:
        BadInputError: one was frozen, added, taken away or replaced since.
    """
    known = {id(p) for p in attached}
    now = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for name, parameter in now.items():
        if id(parameter) not in known:
            raise BadInputError(f"parameter {name} is trained since private training was attached; attach it anew")
    if len(now) < len(known):
        raise BadInputError(
            f"{len(known) - len(now)} parameters were frozen or taken away since private training was attached; "
            "attach it anew"
        )


def _made_up(records: Records, examples: int, whole: tuple[int, ...]) -> dict[str, Tensor]:
    """Return examples in the shapes and types of the records: whole numbers out of ``whole``, others normal."""
    generator = torch.Generator().manual_seed(0)

    def like(tensor: Tensor) -> Tensor:
        shape = (examples, *tensor.shape[1:])
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            made = torch.randn(shape, generator=generator, dtype=torch.float32)
        else:
            made = torch.tensor(whole)[torch.randint(len(whole), shape, generator=generator)]
        return made.to(device=tensor.device, dtype=tensor.dtype)

    return {name: like(tensor) for name, tensor in records.items()}


def _run(loss: ExampleLoss, batch: Records) -> Tensor:
    """Run a forward pass whose random layers draw the same each time, on a batch of its own: it may change it."""
    batch = {name: tensor.clone() for name, tensor in batch.items()}
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    with torch.enable_grad(), drawing_from(lambda examples, values: torch.rand(examples, values, generator=generator)):
        return loss(batch)


def _check_nodes(loss_B: Tensor) -> None:
    """Look for checkpoints that run their layers where nobody can watch them."""
    if any(node.name() == "CheckpointFunctionBackward" for node in _nodes(loss_B)):
        raise BadInputError(
            "the model uses checkpointing with use_reentrant=True, whose layers cannot be watched; use "
            "use_reentrant=False"
        )


def _gradients(module: nn.Module, loss_B: Tensor) -> list[Tensor]:
    """Return autograd's gradient of a batch's sum, of every trained parameter."""
    parameters = trained(module)
    found: Sequence[Tensor | None] = [None] * len(parameters)
    if loss_B.requires_grad:
        found = torch.autograd.grad(loss_B.sum(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(parameters, found, strict=True)]


def _check_structure(mode: GradientMode, module: nn.Module, loss: ExampleLoss, batch: Records) -> None:
    """Look where the graph of a forward pass reaches trained parameters."""
    if isinstance(mode, Strict):  # it watches no layers
        _check_nodes(_run(loss, batch))
        return
    bookkeeper = Bookkeeper(module)
    try:
        units = Units.one_each(len(next(iter(batch.values()))))
        with _told():
            loss_B, _ = bookkeeper.forward(lambda: _run(loss, batch), units)
    finally:
        bookkeeper.close()
    _check_nodes(loss_B)
    names = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    for node in _nodes(loss_B):
        name = names.get(id(getattr(node, "variable", None)))
        if name is not None:
            raise BadInputError(
                f"parameter {name} is used outside of the forward pass of the layer that holds it, where its gradient "
                "cannot be told by unit; call the layer, or give two layers the same parameter "
                "(head.weight = embed.weight)"
            )


def _nodes(loss_B: Tensor) -> Iterator[torch.autograd.graph.Node]:
    """Yield every node of a graph once."""
    waiting = [] if loss_B.grad_fn is None else [loss_B.grad_fn]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                waiting.append(after)


def _check_sum(
    mode: GradientMode,
    module: nn.Module,
    loss: ExampleLoss,
    batch: Records,
    expected: Sequence[Tensor],
    tolerance: float,
) -> None:
    """Compare what the mode sums with autograd's gradient of the same batch."""
    whole = float(torch.stack([_norm(g) for g in expected]).norm()) if expected else 0.0
    with _told():
        units = Units.one_each(EXAMPLES)
        sums = mode.clipped_sum(lambda b: _run(loss, b), batch, units, Clipping("flat", LARGEST_NORM)).sums
    if not whole < LARGEST_NORM / EXAMPLES:  # units that large, or not finite, are left out of every sum
        return
    named = ((name, p) for name, p in module.named_parameters() if p.requires_grad)
    for (name, parameter), total, gradient in zip(named, sums, expected, strict=True):
        difference, size = float(_norm(total.double() - gradient.double())), float(_norm(gradient))
        allowed = _HALF_PARAMETER_TOLERANCE if parameter.dtype in _HALF else tolerance
        if difference > allowed * (size + _FLOOR * whole):
            raise BadInputError(
                f"the units' gradients of parameter {name} do not add up to autograd's: the layer is not what its rule "
                "or sampler takes it for, or the loss holds a gradient itself; register a rule for the layer "
                "(conclave.privacy.bookkeeping.layers.register), or try gradients = 'bookkeeping' or numeric = 'strict'"
            )


_HALF = (torch.float16, torch.bfloat16)


def _tolerance(loss_B: Tensor) -> float:
    """Return how far sums may be off: by what was computed on the way, autocast's share of it included."""
    types = {kept.dtype for node in _nodes(loss_B) for kept in node._input_metadata}
    return _HALF_TOLERANCE if types.intersection(_HALF) else _TOLERANCE


@contextmanager
def _told() -> Iterator[None]:
    """Turn what fails only while it is watched into a refusal: autograd can do it, the mode cannot."""
    try:
        yield
    except BadInputError:
        raise
    except Exception as error:
        said = str(error).split("\n")[0][:200]
        raise BadInputError(
            f"the gradient of single examples cannot be told ({type(error).__name__}: {said}); audit the model with "
            "'conclave audit model', or try gradients = 'bookkeeping' or numeric = 'strict'"
        ) from error


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x.detach(), dtype=torch.float64)
    return norm.cpu()


def _draw_again(examples: int, values: int) -> Tensor:
    """Refuse draws outside of a forward pass."""
    raise BadInputError(
        "a random layer runs again in the backward pass (checkpointing), where it would draw other numbers; keep "
        "random layers out of checkpoints"
    )


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Put back what a forward pass may change: attributes and buffers of the modules, torch's generator."""
    before = [(m, dict(vars(m)), _copies(m._buffers)) for m in module.modules()]
    try:
        with torch.random.fork_rng(), drawing_from(_draw_again), warnings.catch_warnings():
            # Of Opacus's hooks, which are there but not listening, at every backward pass.
            warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
            yield
    finally:
        for m, attributes, buffers in before:
            vars(m).clear()
            vars(m).update(attributes)
            for name, (tensor, value) in buffers.items():
                with torch.no_grad():
                    tensor.copy_(value)
                m._buffers[name] = tensor


def _copies(buffers: Mapping[str, Tensor | None]) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (tensor, tensor.detach().clone()) for name, tensor in buffers.items() if tensor is not None}
