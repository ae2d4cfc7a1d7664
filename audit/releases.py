"""Attack what leaves in addition to the training step: choices of experts, and metrics of held-out units."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from conclave.clients import chooser, evaluator
from conclave.model.records import Batch
from conclave.privacy.audit.residuals import noise_flaws
from conclave.privacy.audit.subject import Finding, all_but
from conclave.privacy.randomness import derive
from conclave.privacy.releases.private_metrics import SENSITIVITY
from conclave.protocol.plan import Plan

_CHARGES = 400


def audit_releases(plan: Plan, tensors: Mapping[str, Tensor], records: Batch) -> list[Finding]:
    """Audit those releases that a plan has.

    Args:
        tensors: wire name → float32, a model with all its experts.
        records: synthetic, at least 2; each is taken as a unit.
    """
    alone = {"unit": "record", "records_per_unit": None}  # synthetic records have no groups
    plan = plan.model_copy(update={"privacy": plan.privacy.model_copy(update=alone)})
    findings = []
    if plan.affinity is not None:
        findings.append(_choice_sensitivity(plan, tensors, records))
    if plan.evaluation is not None and plan.evaluation.noise_multiplier is not None:
        findings += [_metric_sensitivity(plan, tensors, records), _metric_noise(plan, tensors, records)]
    return findings


def _choice_sensitivity(plan: Plan, tensors: Mapping[str, Tensor], records: Batch) -> Finding:
    """Leave out every unit in turn: no expert's utility may move by more than the mechanism was told."""
    sent = {name: tensors[name] for name in plan.choosing_shapes}

    def utilities(units: Tensor) -> Tensor:
        return torch.cat(chooser.utilities(plan, sent, {name: tensor[units] for name, tensor in records.items()}))

    n = len(next(iter(records.values())))
    everyone = utilities(torch.arange(n))
    moved = [float((everyone - utilities(all_but(n, unit))).abs().max()) for unit in range(n)]
    return _bounded("choice sensitivity", moved, chooser.SENSITIVITY, "an expert's utility")


def _metric_sensitivity(plan: Plan, tensors: Mapping[str, Tensor], records: Batch) -> Finding:
    """Leave out every unit in turn, with noise frozen."""
    n = len(next(iter(records.values())))
    everyone = _sums(plan, tensors, records, torch.arange(n))
    moved = [float((everyone - _sums(plan, tensors, records, all_but(n, unit))).norm()) for unit in range(n)]
    return _bounded("metric sensitivity", moved, SENSITIVITY, "the sums")


def _metric_noise(plan: Plan, tensors: Mapping[str, Tensor], records: Batch) -> Finding:
    """Subtract the known sums from the released ones, with everybody and with nobody there."""
    if plan.evaluation is None or plan.evaluation.noise_multiplier is None:
        raise ValueError("the plan measures nothing under privacy")
    held, std = plan.model.all_experts, plan.evaluation.noise_multiplier * SENSITIVITY
    n, rows = len(next(iter(records.values()))), []
    for run in range(_CHARGES):
        units = torch.arange(0 if run % 4 else n)
        there = {name: tensor[units] for name, tensor in records.items()}
        (released,) = evaluator.evaluate(plan, held, tensors, there, derive(bytes(32), "audit", run)).values()
        rows.append((released.double() - _sums(plan, tensors, records, units)) / std)
    values = torch.stack(rows)
    wrong = noise_flaws(values, "sum")
    return Finding("metric noise", f"{values.numel()} values, σ = {std:.4g}", "; ".join(wrong) or None)


def _sums(plan: Plan, tensors: Mapping[str, Tensor], records: Batch, units: Tensor) -> Tensor:
    there = {name: tensor[units] for name, tensor in records.items()}
    return evaluator.metric_sums(plan, plan.model.all_experts, tensors, there).exact()


def _bounded(check: str, moved: list[float], bound: float, what: str) -> Finding:
    worst = max(range(len(moved)), key=lambda unit: (moved[unit] != moved[unit], moved[unit]))
    violation = None
    if not moved[worst] <= bound:
        violation = f"unit {worst} moved {what} by {moved[worst]:.4g}, must be at most {bound:g}"
    return Finding(check, f"{len(moved)} units, most {moved[worst]:.4f} of {bound:g}", violation)
