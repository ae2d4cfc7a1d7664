"""Isolation: a unit's loss and gradient do not depend on the other units; and the forward pass changes no state."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from privacy.audit.subject import Finding, Subject

FAST_TOLERANCE = 1e-3
"""Rounding differs with the rows around; a coupling moves a gradient by far more."""


def check_isolation(subject: Subject) -> Finding:
    """Take every unit's gradient alone, among all, in reverse order, among fewer, and among copies of itself."""
    if subject.mechanism.numeric == "strict":
        return _strict(subject)
    n = subject.examples
    worst, where = 0.0, ""
    for unit in range(n):
        alone = _gradient(subject, torch.tensor([unit]), 0)
        others = {
            "all others": (torch.arange(n), unit),
            "all others, reversed": (torch.arange(n).flip(0), n - 1 - unit),
            "fewer others": (torch.arange(unit, n), 0),
            "copies of itself": (torch.full((n,), unit), n // 2),
        }
        for company, (examples, place) in others.items():
            among = _gradient(subject, examples, place)
            error = float((among - alone).norm() / alone.norm().clamp(min=1e-30))
            if not error <= worst:
                worst, where = error, f"unit {unit} among {company}"
    violation = f"{where}: its gradient changed by {worst:.2g} of its size" if not worst <= FAST_TOLERANCE else None
    return Finding("isolation", f"{n} units in 4 companies, tolerance {FAST_TOLERANCE:g}, worst {worst:.2g}", violation)


def check_gradients(subject: Subject) -> Finding:
    """Compare what each unit contributes, where nothing is clipped, with its gradient by plain autograd.

    A weight that is used outside its layer's forward pass, by ``torch.nn.functional`` say, is not seen by hooks: its
    gradient would be missing from the sum. That leaks nothing, but trains another model.
    """
    worst, where = 0.0, ""
    for unit in range(subject.examples):
        alone = _gradient(subject, torch.tensor([unit]), 0)
        size = float(alone.norm().clamp(min=1e-30))
        unclipped = replace(subject.mechanism, clip=4.0 * size, clipping="flat")
        error = float((subject.sums(torch.tensor([unit]), unclipped) - alone).norm()) / size
        if not error <= worst:
            worst, where = error, f"unit {unit}"
    violation = None
    if not worst <= FAST_TOLERANCE:
        violation = f"{where}: what it contributes differs from its gradient by {worst:.2g} of its size"
    return Finding("gradients", f"{subject.examples} units, worst {worst:.2g}", violation)


def _gradient(subject: Subject, examples: Tensor, place: int) -> Tensor:
    """The gradient of one unit's loss, computed in the company of others by plain autograd."""
    batch = {name: tensor[examples] for name, tensor in subject.records.items()}
    parameters = [p for p in subject.module.parameters() if p.requires_grad]
    torch.manual_seed(0)
    subject.module.train()
    training = subject.training()
    training.close()  # plain autograd: nothing of the training's own may take part
    loss_B = training.loss_with_draws(batch, examples)
    one = loss_B[place].sum()
    if not one.requires_grad:
        return torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    found = torch.autograd.grad(one, parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).double().flatten() for p, g in zip(parameters, found, strict=True)]
    )


def _strict(subject: Subject) -> Finding:
    """At level strict, the sum over all units is the sum of what each contributes alone, bit for bit."""
    n = subject.examples
    together = subject.sums(torch.arange(n))
    apart = torch.stack([subject.sums(torch.tensor([unit])) for unit in range(n)]).sum(0)
    same = torch.equal(together, apart)
    return Finding(
        "isolation", f"{n} units together and alone, bit for bit", None if same else "a contribution changed in company"
    )


def check_state(subject: Subject) -> Finding:
    """Run forward passes in training mode and compare every buffer, bit for bit."""
    before = {name: buffer.clone() for name, buffer in subject.module.named_buffers()}
    subject.module.train()
    torch.manual_seed(0)
    for _ in range(2):
        with subject.training() as training, torch.no_grad():
            training.loss_with_draws(subject.records, torch.arange(subject.examples))
    changed = [n for n, b in subject.module.named_buffers() if n not in before or not _same_bits(b, before[n])]
    violation = f"the forward pass changed buffer {changed[0]}" if changed else None
    return Finding("state", f"{len(before)} buffers, 2 forward passes", violation)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
