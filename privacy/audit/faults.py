"""Faults: units that cannot be used, and batches with nobody in them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from privacy.audit.subject import Finding, Subject, all_but
from privacy.gradient_modes import Records
from privacy.unit_index import UnitIndex


def check_faults(subject: Subject) -> Finding:
    """Poison one unit: the sum must be that of the others. Sample nobody: the step must be pure noise."""
    wrong = []
    n = subject.examples
    victim = n // 2
    others = subject.sums(all_but(n, victim))
    size = others.norm().clamp(min=1e-30)
    for name, poison in (("NaN", math.nan), ("infinity", math.inf)):

        def poisoned(batch: Records, poison: float = poison) -> Tensor:
            loss_B = subject.example_loss(batch)
            # Marked by content, not by place: a mode may run a part of the batch alone.
            factor_B = torch.where(_is_victim(subject, batch, victim), poison, 1.0).to(loss_B.dtype)
            return loss_B * (factor_B if loss_B.dim() == 1 else factor_B[:, None])

        total = subject.sums(torch.arange(n), loss=poisoned)
        if not bool(total.isfinite().all()):
            wrong.append(
                f"a unit with a loss of {name} made the sum non-finite: whoever sees it knows the unit was there"
            )
        elif float((total - others).norm() / size) > 1e-3:
            wrong.append(f"a unit with a loss of {name} moved the sum")
    for name, tensor in subject.records.items():
        if tensor.is_floating_point():
            broken = dict(subject.records) | {name: tensor.clone()}
            broken[name][victim] = math.nan
            total = subject.sums(torch.arange(n), records=broken)
            if not bool(total.isfinite().all()) or float((total - others).norm() / size) > 1e-3:
                wrong.append(f"a record with NaN in {name} shows in the sum")
    nobody = {name: tensor[:0] for name, tensor in subject.records.items()}
    with subject.training() as training:
        gradients = training.noised_gradients(nobody, UnitIndex(0))
    if not all(bool(g.isfinite().all()) and bool((g != 0).all()) for g in gradients):
        wrong.append("an empty batch is not a step of pure noise")
    return Finding("faults", "NaN, infinity, broken records, an empty batch", "; ".join(wrong) or None)


def _is_victim(subject: Subject, batch: Records, victim: int) -> Tensor:
    found: Tensor | None = None
    for name, tensor in subject.records.items():
        rows = batch[name]
        same = (rows.flatten(1) == tensor[victim].flatten()).all(1) if rows.dim() > 1 else rows == tensor[victim]
        found = same if found is None else found & same
    if found is None:
        raise ValueError("there are no records")
    return found
