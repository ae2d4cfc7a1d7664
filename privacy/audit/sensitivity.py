"""Sensitivity: with noise frozen, one unit more or less moves the clipped sum by no more than C."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from conclave.model.records import Records
from conclave.privacy.audit.arithmetic import tolerance_of
from conclave.privacy.audit.observed import coarsest_type
from conclave.privacy.audit.subject import Finding, Subject, all_but, length

SCALES = (1.0, 2.0**20, 2.0**-20)
"""Factors on the loss: gradients far above the bound and far below it."""


def check_sensitivity(subject: Subject) -> Finding:
    """Leave out every unit in turn, at several sizes of gradient.

    At half precision the others' gradients also differ by rounding, each by a little of C; no unit causes that.
    """
    worst, where, n = 0.0, "", subject.examples
    half = torch.finfo(coarsest_type(subject)).bits < 32
    most = 1.0 + (tolerance_of(coarsest_type(subject)) * math.sqrt(n) if half else 0.0)
    for scale in SCALES:

        def scaled(batch: Records, scale: float = scale) -> Tensor:
            loss_B: Tensor = subject.example_loss(batch) * scale
            return loss_B

        everyone = subject.sums(torch.arange(n), loss=scaled)
        for unit in range(n):
            moved = length(everyone - subject.sums(all_but(n, unit), loss=scaled)) / subject.mechanism.clip
            if moved > worst:
                worst, where = moved, f"unit {unit}, loss times {scale:g}"
    violation = f"{where} moved the sum by {worst:.4g} C" if worst > most else None
    return Finding("sensitivity", f"{n} units at {len(SCALES)} sizes of gradient, most {worst:.4f} C", violation)


class _Probe(nn.Module):
    """A dense layer whose input and output gradient are chosen, as a server that crafts weights could arrange."""

    def __init__(self, delta_TO: Tensor, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, delta_TO.shape[1], bias=False)
        self.delta_TO = delta_TO

    def loss(self, batch: Records) -> Tensor:
        """The layer's output weighed by the chosen gradient, [B]."""
        weighed: Tensor = (self.layer(batch["x"]) * self.delta_TO).sum((1, 2))
        return weighed


def check_numerics(subject: Subject) -> Finding:
    """Run the training on crafted inputs whose Gram matrices cancel, underflow or overflow in float32."""
    width = 200
    up = torch.full((1, width), 1000.0)
    cases = {
        "cancellation": (
            torch.cat([up, up * (1 + 2.0**-18)]),
            torch.cat([torch.ones(1, width), -torch.ones(1, width)]),
        ),
        "underflow": (torch.full((2, width), 2.5e-23), torch.full((2, width), 1e18)),
        "overflow": (torch.full((2, width), 1e25), torch.full((2, width), 1e25)),
    }
    wrong = []
    for name, (x_TD, delta_TO) in cases.items():
        probe = _Probe(delta_TO, width)
        exact = float((delta_TO.double().T @ x_TD.double()).norm())
        clip = min(max(exact * 0.1, 1e-6), 1.0)
        mechanism = replace(subject.mechanism, clip=clip, clipping="flat", physical_batch=8, load_share=0.0)
        probed = Subject(probe, probe.loss, {"x": x_TD.unsqueeze(0)}, mechanism, subject.start)
        moved = length(probed.sums(torch.tensor([0]))) / mechanism.clip
        if moved > 1.0:
            wrong.append(f"{name}: one unit contributed {moved:.3g} C")
    return Finding("numerics", "cancellation, underflow and overflow, crafted", "; ".join(wrong) or None)
