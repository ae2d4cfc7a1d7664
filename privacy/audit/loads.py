"""The load histogram: one unit moves it by no more than √(L·K), and every expert's count has noise of its own."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from conclave.model.experts.moe import MoELayer
from conclave.privacy.audit.residuals import noise_flaws
from conclave.privacy.audit.subject import Finding, Subject, all_but
from conclave.privacy.gradients.unit_index import UnitIndex
from conclave.privacy.releases.load_histogram import LOADS

_CHARGES = 400


def check_load_sensitivity(subject: Subject) -> Finding:
    """Leave out every unit in turn, with noise frozen."""
    n, index = subject.examples, UnitIndex(subject.examples)
    bound = _square_bound(subject)

    def histogram(examples: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        with subject.training() as training:
            return training.loads_without_noise(subject.records, index, examples)

    everyone = histogram(torch.arange(n))
    worst, where = 0.0, ""
    for unit in range(n):
        # Squares: √(L·K) and the norm of counts that attain it may be rounded apart.
        moved = float((everyone - histogram(all_but(n, unit))).square().sum().nan_to_num(math.inf)) / bound
        if moved > worst:
            worst, where = moved, f"unit {unit}"
    violation = None
    if worst > 1.0:
        violation = f"{where} moved the histogram by {math.sqrt(worst):.4g} of its bound"
    return Finding("load sensitivity", f"{n} units, most {math.sqrt(worst):.4f} √(L·K), L·K = {bound}", violation)


def check_load_noise(subject: Subject) -> Finding:
    """Subtract the known histogram from the released ones, with everybody and with nobody in the sample."""
    mechanism = replace(subject.mechanism, sampling_rate=1.0, steps=1)
    std = mechanism.noise_parts[LOADS] * math.sqrt(_square_bound(subject))
    rows: list[torch.Tensor] = []
    everyone, nobody = subject.records, {name: tensor[:0] for name, tensor in subject.records.items()}
    for run in range(_CHARGES):
        records = nobody if run % 4 else everyone  # noise is the same whoever is there, and a sample of nobody is quick
        index = UnitIndex(len(next(iter(records.values()))))
        with subject.training(mechanism, run=run) as training:
            torch.manual_seed(0)
            known = training.loads_without_noise(records, index, torch.arange(index.count))
            torch.manual_seed(0)
            training.step(records, index)
            released = torch.cat(list(training.loads.values())).double()
        rows.append((released - known) / std)
    values = torch.stack(rows)
    wrong = noise_flaws(values, "expert")
    return Finding(
        "load noise", f"{values.numel()} values of {_CHARGES} charges, σ = {mechanism.noise_parts[LOADS]:.4g}",
        "; ".join(wrong) or None,
    )  # fmt: skip


def _square_bound(subject: Subject) -> int:
    """L·K of the model, computed from its routers and not from the histogram under audit."""
    return sum(layer.router.top_k for layer in subject.module.modules() if isinstance(layer, MoELayer))
