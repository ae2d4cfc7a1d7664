"""Faults: units that cannot be used, and batches with nobody in them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from conclave.model.records import Records
from conclave.privacy.audit.arithmetic import tolerance_of
from conclave.privacy.audit.observed import coarsest_type, kept
from conclave.privacy.audit.subject import Finding, Subject, all_but
from conclave.privacy.gradients.unit_index import UnitIndex


def check_faults(subject: Subject) -> Finding:
    """Poison one unit: the sum must be that of the others. Sample nobody: the step must be pure noise."""
    n = subject.examples
    victim = n // 2
    tolerance = tolerance_of(coarsest_type(subject))
    with kept(subject) as memory:
        wrong = _poisoned_losses(subject, victim, tolerance)
        memory.restore()
        wrong += _broken_records(subject, victim, tolerance)
        memory.restore()
        nobody = {name: tensor[:0] for name, tensor in subject.records.items()}
        with subject.training() as training:
            gradients = training.noised_gradients(nobody, UnitIndex(0))
    if not all(bool(g.isfinite().all()) and bool((g != 0).all()) for g in gradients):
        wrong.append("an empty batch is not a step of pure noise")
    return Finding("faults", "NaN, infinity, broken records, an empty batch", "; ".join(wrong) or None)


def _poisoned_losses(subject: Subject, victim: int, tolerance: float) -> list[str]:
    everyone = torch.arange(subject.examples)
    # Marked by content, not by place: a mode may run a part of the batch alone. Twins are victims too.
    twins_N = _is_victim(subject, subject.records, victim)
    others = subject.sums(everyone[~twins_N.cpu()])
    wrong = []
    for name, poison in (("NaN", math.nan), ("infinity", math.inf)):

        def poisoned(batch: Records, poison: float = poison) -> Tensor:
            found_B = _is_victim(subject, batch, victim)  # before the model may change its input in place
            loss_B = subject.example_loss(batch)
            factor_B = torch.where(found_B, poison, 1.0).to(loss_B.device, loss_B.dtype)
            return loss_B * (factor_B if loss_B.dim() == 1 else factor_B[:, None])

        total = subject.sums(everyone, loss=poisoned)
        if not bool(total.isfinite().all()):
            wrong.append(
                f"a unit with a loss of {name} made the sum non-finite: whoever sees it knows the unit was there"
            )
        elif not _agree(total, others, subject, tolerance):
            wrong.append(f"a unit with a loss of {name} moved the sum")
    return wrong


def _broken_records(subject: Subject, victim: int, tolerance: float) -> list[str]:
    """A model may cope with NaN in a record: then what that unit contributes alone is all that it may change."""
    everyone, wrong = torch.arange(subject.examples), []
    others = subject.sums(all_but(subject.examples, victim))
    for name, tensor in subject.records.items():
        if tensor.is_floating_point():
            broken = dict(subject.records) | {name: tensor.clone()}
            broken[name][victim] = math.nan
            total = subject.sums(everyone, records=broken)
            alone = subject.sums(torch.tensor([victim]), records=broken)
            if not bool(total.isfinite().all()) or not _agree(total, others + alone, subject, tolerance):
                wrong.append(f"a record with NaN in {name} shows in the sum")
    return wrong


def _agree(total: Tensor, expected: Tensor, subject: Subject, tolerance: float) -> bool:
    """Whether rounding explains the difference: relative to the sum, or if that is small, to all that was added up."""
    size = max(float(expected.norm()), 1e-3 * subject.mechanism.clip)
    return float((total - expected).norm()) <= tolerance * size


def _is_victim(subject: Subject, batch: Records, victim: int) -> Tensor:
    found: Tensor | None = None
    for name, tensor in subject.records.items():
        rows = batch[name]
        same = (rows.flatten(1) == tensor[victim].flatten()).all(1) if rows.dim() > 1 else rows == tensor[victim]
        found = same if found is None else found & same
    if found is None:
        raise ValueError("there are no records")
    return found
