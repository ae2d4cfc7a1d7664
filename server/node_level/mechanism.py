"""The node as the unit of privacy: clip every node's delta, add noise to everything, divide by public numbers.

DP-FedAvg (McMahan et al. 2018, arXiv:1710.06963) for experts that only some nodes hold. The server is trusted with the
deltas; what it publishes, the model after every round, is protected. The record-level claim of each node stands beside
this one and is never combined with it.

Guarantee: with noise multiplier σ and a secret Poisson cohort of rate r, the published step is the Poisson-subsampled
Gaussian mechanism with sensitivity 1 in units of ``clip`` under add/remove of one node. It needs that nothing else
about the step depends on who is there: each node's experts are a function of (seed, round, node), every group is
noised in every round whether or not anybody holds it, and divisors are expected counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Size, Tensor

from conclave.model.experts.config import HeldExperts
from conclave.model.parameters import owner
from conclave.privacy.randomness import derive, standard_normal, uniform_words
from conclave.server.aggregate.aggregation import WeightedDelta
from conclave.server.assign.cohort import public_generator

_SHRINK = 1.0 - 2.0**-10  # rounding of norm and sum cannot carry a contribution over the bound


def secret_cohort(nodes: Sequence[str], rate: float, secret: bytes) -> list[str]:
    """Return who takes part, sorted: each node independently with probability ``rate``.

    A node's coin is a function of (secret, node). Whoever knows the coins knows who took part, and has no benefit from
    sampling: they never leave the server.
    """
    threshold = int(rate * 2**64)
    return [node for node in sorted(nodes) if int(uniform_words(derive(secret, "cohort", node), 1)[0]) < threshold]


def own_experts(node: str, *, experts: int, count: int, layers: int, seed: int, round_number: int) -> HeldExperts:
    """Return layer → expert ids of one node, ascending; a pure function of its arguments, whoever else is there."""
    return {
        layer: tuple(
            sorted(public_generator(seed, "own experts", round_number, layer, node).sample(range(experts), count))
        )
        for layer in range(layers)
    }


class NodeLevelSum:
    """The noised sum of clipped deltas divided by what was expected; it takes the place of an average.

    The result has the same bits in whatever order the contributions come: they are added, in float64, in the order of
    ``nodes``.
    """

    def __init__(
        self,
        nodes: Sequence[str],
        *,
        shapes: Mapping[str, Size],
        clip: float,
        noise_multiplier: float,
        expected_nodes: float,
        expert_share: float,
    ) -> None:
        """Expect contributions from ``nodes``; not all need come.

        Args:
            shapes: wire name → shape of every tensor of the model.
            clip: bound of a node's joint delta over all tensors that it holds, L2.
            noise_multiplier: σ.
            expected_nodes: cohort rate × the public number of nodes.
            expert_share: the share of a layer's experts that a node holds.
        """
        self._nodes = list(nodes)
        self._shapes, self._clip, self._std = shapes, clip, noise_multiplier * clip
        self._expected, self._expert_share = expected_nodes, expert_share
        self._clipped: dict[str, Mapping[str, Tensor]] = {}

    def add(self, node: str, contribution: WeightedDelta | None) -> None:
        """Take a node's contribution; None says that there will be none, which adds zeros."""
        if contribution is not None:
            self._clipped[node] = clipped(contribution.delta, self._clip)

    def result(self, secret: bytes) -> dict[str, Tensor]:
        """Return wire name → float32 for every tensor of the model; ``secret``, of this round, seeds the noise."""
        total = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in self._shapes.items()}
        for node in self._nodes:
            for name, delta in self._clipped.get(node, {}).items():
                total[name] += delta
        for name, tensor in total.items():
            noise = standard_normal(derive(secret, "node-level noise", name), tensor.numel())
            tensor += noise.view_as(tensor) * self._std
            share = 1.0 if owner(name).layer is None else self._expert_share
            tensor /= self._expected * share
        return {name: tensor.to(torch.float32) for name, tensor in total.items()}


def clipped(delta: Mapping[str, Tensor], bound: float) -> dict[str, Tensor]:
    """Return a delta scaled down to an L2 norm of at most ``bound`` over all its tensors together, float64.

    One that is not finite becomes zeros, by selection.
    """
    wide = {name: tensor.to(torch.float64) for name, tensor in delta.items()}
    norm = math.hypot(*(float(torch.linalg.vector_norm(tensor)) for tensor in wide.values()))
    if not math.isfinite(norm):
        return {name: torch.zeros_like(tensor) for name, tensor in wide.items()}
    factor = _SHRINK * min(1.0, bound / norm) if norm > 0.0 else 0.0
    return {name: tensor * factor for name, tensor in wide.items()}
