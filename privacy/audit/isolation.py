"""Isolation: a unit's loss and gradient do not depend on the other units; and the forward pass keeps nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from conclave.base.errors import BadInputError
from conclave.model.records import Records
from conclave.privacy.audit.arithmetic import RoundedOnce, tolerance_of
from conclave.privacy.audit.company import Company, companies
from conclave.privacy.audit.memory import Memory, same_bits
from conclave.privacy.audit.observed import (
    Losses,
    coarsest_type,
    gradient,
    has_drawn,
    kept,
    losses_of,
    most_at_once,
    same_randomness,
)
from conclave.privacy.audit.subject import Finding, Subject, length, said
from conclave.privacy.gradients.clipping import LARGEST_NORM, SMALLEST_CLIP

_SMALL_SHARE = 1e-3
"""An error is measured against a unit's own size, or this share of the largest unit's: what cancels to nearly nothing
has no digits of its own."""
_CALLS = 25
Shown = Mapping[str, list[object]]


def check_isolation(subject: Subject) -> Finding:
    """Take every unit alone, then among others: few, many, copies, in other places and orders, of other content."""
    if subject.mechanism.numeric == "strict" and _can_be_trained(subject):
        return _strict(subject)
    with kept(subject) as memory, RoundedOnce() as arithmetic:
        return _compared(subject, memory, arithmetic)


def _can_be_trained(subject: Subject) -> bool:
    try:
        subject.try_training()
    except BadInputError:
        return False
    return True


@dataclass(frozen=True)
class _Alone:
    """What each unit is by itself: loss_N [N] or [N, tasks], gradient_N [N, parameters]; float64."""

    loss_N: Tensor
    gradient_N: Tensor


def _compared(subject: Subject, memory: Memory, arithmetic: RoundedOnce) -> Finding:
    losses = losses_of(subject)
    alone = _each_alone(subject, losses, memory)
    if isinstance(alone, str):
        return Finding("isolation", "every unit alone", alone)
    most = most_at_once(subject)
    worst, where, count = 0.0, "", 0
    for company in companies(subject.records, most):
        memory.restore()
        try:
            for unit, error in _errors(subject, losses, company, alone):
                if error > worst:
                    worst, where = error, f"unit {unit} among {company.name}"
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever code that was brought may raise
            if company.made_up:  # perhaps no record looks like this: then nothing is learned
                continue
            return Finding("isolation", "every unit alone and among others", _fails(company, error))
        count += 1
        if worst > arithmetic.tolerance:  # one counter-example is enough
            break
    looked_at = (
        f"{subject.examples} units in {count} companies of up to {most}, tolerance {arithmetic.tolerance:.2g}, "
        f"worst {worst:.2g}"
    )
    if worst <= arithmetic.tolerance:
        return Finding("isolation", looked_at)
    return Finding("isolation", looked_at, f"{where}: its loss or gradient changed by {worst:.2g} of its size")


def _fails(company: Company, error: Exception) -> str:
    return f"the loss fails for units among {company.name}, not alone: {said(error)}"


def _each_alone(subject: Subject, losses: Losses, memory: Memory) -> _Alone | str:
    """Return each unit by itself, or what went wrong, as a violation."""
    loss_N, gradient_N = [], []
    for unit in range(subject.examples):
        memory.restore()
        example = torch.tensor([unit])
        try:
            loss_1 = losses(_rows(subject.records, example), example)
            if loss_1.dim() not in (1, 2) or len(loss_1) != 1:
                raise BadInputError(f"the loss of one example has shape {list(loss_1.shape)}, must be [1]")
            loss_N.append(loss_1[0].detach().double())
            gradient_N.append(gradient(subject, loss_1.sum()))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever code that was brought may raise
            return f"the loss fails for unit {unit} alone, not among others: {said(error)}"
    return _Alone(torch.stack(loss_N), torch.stack(gradient_N))


def _errors(subject: Subject, losses: Losses, company: Company, alone: _Alone) -> Iterator[tuple[int, float]]:
    """Yield how far units are from what they are alone, relative to their size: all losses, and some gradients."""
    loss_B = losses(company.batch, company.example_B)
    known_R = company.known_B.nonzero().flatten()
    unit_R = company.example_B[known_R]
    if loss_B.dim() not in (1, 2) or len(loss_B) != len(company.example_B):
        raise BadInputError(f"the loss of {len(company.example_B)} examples has shape {list(loss_B.shape)}")
    for unit, now, before in zip(unit_R.tolist(), loss_B[known_R].detach().double(), alone.loss_N[unit_R], strict=True):
        yield unit, _relative(now, before, alone.loss_N)
    for row in {"none": [], "last": [-1], "ends": [0, -1]}[company.gradients]:
        unit = int(unit_R[row])
        now = gradient(subject, loss_B[known_R[row]].sum())
        yield unit, _relative(now, alone.gradient_N[unit], alone.gradient_N)


def _relative(now: Tensor, before: Tensor, all_N: Tensor) -> float:
    """Return the error; 0 if both are the same, also if both are NaN."""
    if same_bits(now, before):
        return 0.0
    sizes_N = all_N.reshape(len(all_N), -1).norm(dim=1)
    floor = _SMALL_SHARE * float(sizes_N[sizes_N.isfinite()].max()) if bool(sizes_N.isfinite().any()) else 0.0
    return length(now - before) / max(length(before), floor, 1e-30) if bool(before.isfinite().all()) else math.inf


def _rows(records: Records, example_B: Tensor) -> dict[str, Tensor]:
    return {name: tensor[example_B.to(tensor.device)] for name, tensor in records.items()}


def _strict(subject: Subject) -> Finding:
    """At level strict, the sum over all units is the sum of what each contributes alone, bit for bit."""
    n = subject.examples
    together = subject.sums(torch.arange(n))
    apart = torch.stack([subject.sums(torch.tensor([unit])) for unit in range(n)]).sum(0)
    same = torch.equal(together, apart)
    return Finding(
        "isolation", f"{n} units together and alone, bit for bit", None if same else "a contribution changed in company"
    )


def check_gradients(subject: Subject) -> Finding:
    """Compare what units contribute, alone and together and without clipping, with gradients by plain autograd.

    A weight that is used outside its layer's forward pass, by ``torch.nn.functional`` say, is not seen by hooks: its
    gradient would be missing from the sum. That leaks nothing, but trains another model.
    """
    tolerance = tolerance_of(coarsest_type(subject))
    units = [torch.tensor([unit]) for unit in range(subject.examples)]
    with kept(subject) as memory:
        losses, truths = losses_of(subject), []
        for unit in units:
            memory.restore()
            truths.append(gradient(subject, losses(_rows(subject.records, unit), unit).sum()))
        worst, where = 0.0, ""
        for chosen in [*units, torch.arange(subject.examples)]:
            memory.restore()
            parts = torch.stack([truths[unit] for unit in chosen.tolist()])
            size = float(parts.norm(dim=1).max().clamp(min=1e-30))
            unclipped = replace(
                subject.mechanism, clip=min(max(4.0 * size, SMALLEST_CLIP), LARGEST_NORM), clipping="flat"
            )
            error = length(subject.sums(chosen, unclipped) - parts.sum(0)) / size
            if error > worst:
                worst, where = error, f"unit {int(chosen[0])}" if len(chosen) == 1 else "all units together"
    violation = None
    if worst > tolerance:
        violation = f"{where}: what is summed differs from the gradient by {worst:.2g} of its size"
    return Finding("gradients", f"{subject.examples} units, tolerance {tolerance:.2g}, worst {worst:.2g}", violation)


def check_state(subject: Subject) -> Finding:
    """Use the model on records: it must keep nothing of them, stay the same model, and draw for each record alone.

    Compared are what Python shows of its memory after records that differ, and its losses and gradients when fresh and
    when used. A table that is filled at the first call, whatever the records, is fine; so is what the next call writes
    over unread.
    """
    n = subject.examples
    everyone = torch.arange(n)
    halves = everyone % (n // 2), n // 2 + everyone % (n - n // 2)
    losses = losses_of(subject)
    with kept(subject) as memory, RoundedOnce() as arithmetic:

        def use(example_B: Tensor) -> Tensor:
            return losses(_rows(subject.records, example_B), example_B)

        def behaviour() -> Tensor:
            loss_B = use(everyone)
            return torch.cat([loss_B.detach().double().flatten(), gradient(subject, loss_B.sum())])

        before = _saved(subject)
        fresh, shown = behaviour(), []
        for history in (halves[0], halves[0], halves[1]):
            memory.restore()
            use(history)
            used = behaviour()
            shown.append(memory.fingerprint())
            changed = [name for name, tensor in _saved(subject).items() if not same_bits(tensor, before[name])]
        wrong = [f"the forward pass changed {name}" for name in changed[:1]]
        wrong += [f"{path} keeps what the forward pass saw" for path in _differ(*shown)[:1]]
        difference = _relative(used, fresh, fresh.unsqueeze(0))
        tolerance = arithmetic.tolerance
    with kept(subject):  # the same batch by the same kernels: no other arithmetic is needed
        first = losses(subject.records, everyone).detach().double().flatten()
        for _ in range(_CALLS):
            now = losses(subject.records, everyone).detach().double().flatten()
            difference = max(difference, _relative(now, first, first.unsqueeze(0)))
    drawn, at_all = _other_draws(subject)
    if difference > tolerance:
        wrong.append(f"used, its losses or gradients differ by {difference:.2g} from those of a fresh copy")
    elif drawn > tolerance:
        wrong.append(
            f"its losses differ by {drawn:.2g} with what a stream draws that all records share; "
            "draw with conclave.model.layers.unit_random"
        )
    looked_at = f"{len(before)} saved tensors, what Python shows of memory, {_CALLS} calls, {_CALLS} seeds"
    if not wrong:
        wrong += _unlike_when_built_anew(subject, halves, tolerance)
    incomplete = "it draws from a stream that all records share, to no effect with these seeds" if at_all else None
    return Finding("state", looked_at, "; ".join(wrong) or None, None if wrong else incomplete)


def _unlike_when_built_anew(subject: Subject, halves: tuple[Tensor, Tensor], tolerance: float) -> list[str]:
    """Compare models built alike that saw different records first: this finds memory that Python does not show.

    If they also differ after the same records, or cannot be built twice, nothing follows.
    """
    build = subject.rebuild
    if build is None:
        return []
    state, everyone = _saved(subject), torch.arange(subject.examples)

    def losses_after(history: Tensor) -> Tensor:
        same_randomness()
        module, loss = build()
        module.load_state_dict(state)
        losses = losses_of(replace(subject, module=module, example_loss=loss))
        losses(_rows(subject.records, history), history)
        return losses(subject.records, everyone).detach().double().flatten()

    try:
        once, again, other = (losses_after(history) for history in (halves[0], halves[0], halves[1]))
    except Exception:  # of code that was brought
        return []
    if _relative(again, once, once.unsqueeze(0)) > tolerance:
        return []
    difference = _relative(other, once, once.unsqueeze(0))
    if difference <= tolerance:
        return []
    return [f"built anew, its losses differ by {difference:.2g} after other records were seen first"]


def _other_draws(subject: Subject) -> tuple[float, bool]:
    """Return how far losses differ if draws that belong to no unit are repeated, and whether there are any.

    Such a draw depends on how many were made before it, and so on other units of earlier batches.
    """
    losses, everyone = losses_of(subject, range(_CALLS)), torch.arange(subject.examples)
    with kept(subject) as memory:
        found, at_all = [], False
        for seed in range(_CALLS):
            memory.restore()
            found.append(losses(subject.records, everyone).detach().double().flatten())
            at_all |= has_drawn(seed)
        return max(_relative(now, found[0], found[0].unsqueeze(0)) for now in found), at_all


def _saved(subject: Subject) -> dict[str, Tensor]:
    """Parameters and buffers, as they are sent."""
    return {name: tensor.detach().clone() for name, tensor in subject.module.state_dict().items()}


def _differ(once: Shown, again: Shown, other: Shown) -> list[str]:
    """Return the paths that differ after other records, and do not after the same ones, as a clock would."""
    paths = [
        path
        for path in [*other, *(once.keys() - other.keys())]  # the shortest first
        if once.get(path) != other.get(path) and once.get(path) == again.get(path)
    ]
    return [re.sub(r"\._(modules|parameters|buffers)\b", "", path) for path in paths]
