"""Participation and noise: statistics with stated false-alarm rates, on the training's own sampler and steps."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from scipy import stats

from conclave.privacy.audit.residuals import FALSE_ALARM, correlated, size_and_law
from conclave.privacy.audit.subject import Finding, Subject
from conclave.privacy.gradients.unit_index import UnitIndex

NOISE_VALUES = 60_000
"""So many show σ wrong by 2 % at seven standard errors."""


def check_participation(subject: Subject) -> Finding:
    """Compare batch sizes and units' repeats with independent draws at the stated rate."""
    rate, steps = subject.mechanism.sampling_rate, 400
    if rate == 1.0:
        rate = 0.5  # everyone always takes part; the sampler itself shows below that
    units = max(400, min(round(20 / rate), 1_000_000))
    sizes, repeats = torch.zeros(steps), torch.zeros(units)
    with subject.training(replace(subject.mechanism, sampling_rate=rate)) as training:
        for step in range(steps):
            training.step_number = step
            chosen = training.sample(units)
            sizes[step] = len(chosen)
            repeats[chosen] += 1.0
    wrong = []
    total = int(sizes.sum())
    law = stats.binom(steps * units, rate)
    if not law.ppf(FALSE_ALARM / 2) <= total <= law.ppf(1 - FALSE_ALARM / 2):
        wrong.append(f"units took part at a rate of {total / (steps * units):.4g}, stated is {rate:g}")
    for what, counts, trials in (("batch sizes", sizes, units), ("repeats of a unit", repeats, steps)):
        variance = trials * rate * (1 - rate)
        square = float((counts.double() - trials * rate).square().mean())
        # The square of one binomial count about its mean varies by μ₄ − variance²; many of them are about normal.
        fourth = variance * (1 + 3 * (trials - 2) * rate * (1 - rate))
        error = math.sqrt((fourth - variance**2) / len(counts))
        if abs(square - variance) > -float(stats.norm.ppf(FALSE_ALARM / 2)) * error:
            wrong.append(f"the variance of {what} is {square / variance:.2f} of what independent draws have")
    return Finding("participation", f"{steps} steps of {units} units at rate {rate:g}", "; ".join(wrong) or None)


def check_noise(subject: Subject) -> Finding:
    """Take steps, subtract the sum that is known, and test what is left: size, law, repetition, and its presence."""
    mechanism = replace(subject.mechanism, sampling_rate=1.0)
    index, everyone = UnitIndex(subject.examples), torch.arange(subject.examples)
    std = mechanism.gradient_noise_multiplier * mechanism.clip
    rounds: list[torch.Tensor] = []
    silent = set[str]()
    names = [name for name, p in subject.module.named_parameters() if p.requires_grad]
    torch.manual_seed(0)
    run = 0
    while len(rounds) < 3 or sum(map(len, rounds)) < NOISE_VALUES:
        with subject.training(mechanism, run=run) as training:
            torch.manual_seed(0)
            known = training.sums_without_noise(subject.records, index, everyone)
            torch.manual_seed(0)
            noised = [g * mechanism.divisor for g in training.noised_gradients(subject.records, index)]
        parts = [(g.double() - k).flatten() / std for g, k in zip(noised, known, strict=True)]
        for name, part, total in zip(names, parts, noised, strict=True):
            if bool((total == 0).any()) or float(part.abs().max()) < 1e-6:
                silent.add(name)
        rounds.append(torch.cat(parts))
        run += 1
    return Finding(
        "noise",
        f"{sum(map(len, rounds))} values of {len(rounds)} charges, σ = {mechanism.gradient_noise_multiplier:.4g}",
        "; ".join(_noise_violations(rounds, silent)) or None,
    )


def _noise_violations(rounds: list[torch.Tensor], silent: set[str]) -> list[str]:
    wrong = [f"{name} has coordinates without noise" for name in sorted(silent)[:1]]
    values = torch.cat(rounds)
    if not bool(values.isfinite().all()):
        return [*wrong, "an update is not finite"]
    first, second = rounds[0], rounds[1]
    half = len(first) // 2
    return [
        *wrong,
        *size_and_law(values),
        *correlated("charges", first, second),
        *correlated("coordinates", first[:half], first[half : 2 * half]),
    ]
