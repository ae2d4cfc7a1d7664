"""Balancing: selection biases are moved against the expert loads that nodes release, noised (arXiv:2408.15664).

Nodes hold different experts, so a load is compared with what there was to choose from: of K choices a token makes among
k experts held, an expert can expect K/k. ``relative = load · k / (K · q · declared size · steps)`` has mean 1 over the
experts of a node whose declared size is its true one; all but the load is public.

Only whether an expert is above or below the mean counts, so a node that lies about its loads moves a bias by no more
than the rate in a round, whatever it claims.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from conclave.base.frozen import Frozen
from conclave.model.experts.config import HeldExperts
from conclave.model.routers.sigmoid import moved_bias
from conclave.privacy.releases.load_histogram import LOADS, load_name, load_shapes, sensitivity
from conclave.protocol.plan import Plan

BIAS = "selection_bias"

Loads = list[list[float | None]]
"""By layer and expert, the noised load relative to what its holders expected; None where nobody held the expert."""


class BalancingConfig(Frozen):
    """Release expert loads and move selection biases by them.

    share: what the load histogram gets of the precision σ⁻² of every sample; the gradient's noise grows by
        1/√(1 − share).
    rate: by how much a bias moves in round one; it falls linearly by the share ``decay`` until the last.
    """

    share: float = Field(ge=1e-4, le=0.5)
    rate: float = Field(gt=0.0, le=1.0)
    decay: float = Field(default=0.0, ge=0.0, le=1.0)

    def rate_of(self, round_number: int, rounds: int) -> float:
        """Return the step of a round (1 to ``rounds``)."""
        return self.rate * (1.0 - self.decay * (round_number - 1) / max(1, rounds - 1))


class _Report(NamedTuple):
    node: str
    weight: float
    relative: dict[int, Tensor]  # layer → float64 [held]
    held: HeldExperts


def load_bound(plan: Plan, declared_size: int) -> float:
    """Return the largest plausible size of an honest load of one round.

    Three times (the expected sample, plus its spread and nine standard deviations of the noise over three). That is a
    generous bound for an expert that every token of every unit chose.
    """
    expected = plan.privacy.sampling_rate * declared_size
    noise = plan.noise_parts[LOADS] * sensitivity(plan.model.layers, plan.model.experts.top_k)
    return 3.0 * (plan.training.steps * expected + math.sqrt(plan.training.steps) * (math.sqrt(expected) + 3.0 * noise))


class Balancer:
    """Collects the loads of one round, whatever the order they come in, and moves the biases."""

    def __init__(self, plan: Plan, config: BalancingConfig) -> None:
        self._plan, self._config = plan, config
        self._reports: list[_Report] = []

    def take(
        self, node: str, held: HeldExperts, loads: Mapping[str, Tensor], declared_size: int, weight: float
    ) -> None:
        """Take the loads of a reply that was accepted: finite, exactly those of ``held``, within :func:`load_bound`."""
        plan = self._plan
        chosen = plan.model.experts.top_k * plan.privacy.sampling_rate * declared_size * plan.training.steps
        relative = {layer: loads[load_name(layer)].double() * (len(ids) / chosen) for layer, ids in held.items()}
        self._reports.append(_Report(node, weight, relative, held))

    def relative_loads(self) -> Loads:
        """Return the loads of the round, each over its reports."""
        experts = self._plan.model.experts.routed
        total_LE = torch.zeros(self._plan.model.layers, experts, dtype=torch.float64)
        weight_LE = torch.zeros_like(total_LE)
        for report in sorted(self._reports, key=lambda report: report.node):  # the same bits, whoever answered first
            for layer, ids in report.held.items():
                place_H = torch.tensor(ids)
                total_LE[layer, place_H] += report.weight * report.relative[layer]
                weight_LE[layer, place_H] += report.weight
        mean_LE = total_LE / weight_LE
        return [[value if math.isfinite(value) else None for value in row] for row in mean_LE.tolist()]

    def move(self, tensors: Mapping[str, Tensor], round_number: int) -> None:
        """Move the biases among global ``tensors``, in place; an expert that nobody reported keeps its own."""
        rate = self._config.rate_of(round_number, self._plan.rounds)
        if not rate:
            return
        for layer, loads in enumerate(self.relative_loads()):
            reported = [(expert, load) for expert, load in enumerate(loads) if load is not None]
            if not reported:
                continue
            biases = [tensors[f"router/{layer}/{expert}/{BIAS}"].data for expert, _ in reported]
            load_E = torch.tensor([load for _, load in reported], dtype=torch.float64)
            moved_E = moved_bias(torch.cat(biases), load_E, rate)
            for bias, moved in zip(biases, moved_E, strict=True):
                bias.fill_(float(moved))


def plausible(loads: Mapping[str, Tensor], bound: float) -> bool:
    """Whether no load is larger than ``bound``, above or below zero."""
    return all(float(tensor.abs().max()) <= bound for tensor in loads.values())


def split_loads(tensors: Mapping[str, Tensor], held: HeldExperts) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Divide a reply's tensors into the delta and the loads."""
    names = load_shapes(held).keys()
    delta = {name: tensor for name, tensor in tensors.items() if name not in names}
    return delta, {name: tensor for name, tensor in tensors.items() if name in names}
