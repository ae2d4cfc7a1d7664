"""How much each expert was used, noised: released from the sample of the gradient, and one event with it.

What a unit contributes, for each MoE layer, is the share of its tokens that chose each expert held. Such entries lie in
[0, 1] and sum to at most K, so their L2 norm is at most √K, and √(L·K) over L layers. A group contributes the mean over
its records. Padding does not count as tokens.

Contributions are whole steps of 2^-30, rounded toward zero and summed in integers, and noise is rounded onto the same
grid, at every numeric level: they are counts, so nothing needs to be certified or clipped. They count choices,
and at level ``fast`` a choice rests on the assumption that the gradient rests on: that nobody else's presence changes
a row's rounding enough to matter. At level ``strict`` each unit runs alone.

Dimension suffixes: B examples, T tokens, K experts per token, E experts held, U units.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Size, Tensor, nn

from conclave.base.errors import BadInputError
from conclave.model.experts.config import HeldExperts
from conclave.model.experts.moe import MoELayer
from conclave.model.layers.padding import present_tokens
from conclave.model.routers.routing import Routing
from conclave.privacy.accounting.mechanisms import split_noise
from conclave.privacy.randomness import standard_normal

if TYPE_CHECKING:  # a plan names the histogram, and needs no gradients
    from conclave.privacy.bookkeeping import Units

GRID_BITS = 30
DELTA, LOADS = "delta", "loads"


def release_shares(load_share: float) -> dict[str, float]:
    """Return what is released from each sample, by name, with its share of the joint precision σ⁻²."""
    return {DELTA: 1.0 - load_share, LOADS: load_share} if load_share else {DELTA: 1.0}


def noise_parts(noise_multiplier: float, load_share: float) -> dict[str, float]:
    """Return σ of each release, relative to its own sensitivity; together they are one event of ``noise_multiplier``.

    A share s of the precision costs the gradient a factor 1/√(1 − s) in noise, and leaves the loads σ/√s.
    """
    return dict(split_noise(noise_multiplier, release_shares(load_share).items()))


def sensitivity(layers: int, top_k: int) -> float:
    """Return √(L·K): by how much one unit moves the histogram of all layers, L2."""
    return math.sqrt(layers * top_k)


def load_name(layer: int) -> str:
    """Return the name under which a layer's histogram is released."""
    return f"load/{layer}"


def load_shapes(held: HeldExperts) -> dict[str, Size]:
    """Return name → shape of the histograms of a holder of ``held``."""
    return {load_name(layer): Size([len(ids)]) for layer, ids in held.items()}


class LoadHistogram:
    """Counts what a module's MoE layers choose for the units of a step, adds noise, and adds up steps.

    A gradient mode may run an example twice, or parts of a batch alone: an example's last choice counts.
    """

    def __init__(self, module: nn.Module, noise_multiplier: float) -> None:
        """Attach to ``module``; :meth:`close` leaves it as it was.

        Args:
            noise_multiplier: σ relative to the sensitivity.

        Raises:
            BadInputError: the module has no MoE layer.
        """
        layers = [layer for layer in module.modules() if isinstance(layer, MoELayer)]
        if not layers:
            raise BadInputError("the model has no MoE layer of the family's, must have one to release expert loads")
        self.sensitivity = sensitivity(len(layers), layers[0].router.top_k)
        self.noise_multiplier = noise_multiplier
        self._sums = [torch.zeros(layer.held, dtype=torch.int64) for layer in layers]
        self._released = [torch.zeros(layer.held, dtype=torch.float64) for layer in layers]
        self._shares: list[Tensor] = []  # of the physical batch, int64 [B, E] for each layer, in steps of the grid
        self._parts = [torch.zeros_like(total) for total in self._sums]  # of a unit that comes in parts
        self._sorted_B = self._place_B = torch.zeros(0, dtype=torch.int64)
        self._watched: tuple[Tensor, Mapping[str, Tensor]] | None = None
        self._handles = [
            layer.register_forward_hook(partial(self._on_forward, number)) for number, layer in enumerate(layers)
        ]

    def close(self) -> None:
        """Detach from the module."""
        for handle in self._handles:
            handle.remove()

    def begin_step(self) -> None:
        """Forget what was counted and not noised."""
        for total in (*self._sums, *self._parts):
            total.zero_()

    def begin_batch(self, example_B: Tensor) -> None:
        """Expect the examples of a physical batch, by number; one that is never run counts as nothing."""
        self._sorted_B, self._place_B = example_B.sort()
        self._shares = [torch.zeros(len(example_B), len(total), dtype=torch.int64) for total in self._sums]

    @contextmanager
    def watching(self, example_B: Tensor, batch: Mapping[str, Tensor]) -> Iterator[None]:
        """Take note of what is chosen within, for the examples numbered ``example_B``; of nothing between batches."""
        self._watched = (example_B, batch) if self._shares else None
        try:
            yield
        finally:
            self._watched = None

    def end_batch(self, units: Units) -> None:
        """Add the contributions of the batch's units to the step's sums."""
        for total, share_BE in zip(self._sums, self._shares, strict=True):
            if units.unit_B is None:
                total += share_BE.sum(0)
                continue
            unit_B = units.unit_B.cpu()
            size_U = torch.bincount(unit_B, minlength=units.count)
            share_UE = share_BE.new_zeros(units.count, len(total)).index_add_(0, unit_B, share_BE)
            total += (share_UE // size_U[:, None]).sum(0)
        self._shares = []

    def end_part(self, unit_size: int | None) -> None:
        """Keep the contributions of a batch that is a part of one unit; with the last part, add the unit's to the sums.

        Args:
            unit_size: examples of the unit, after its last part; None before.
        """
        for total, part, share_BE in zip(self._sums, self._parts, self._shares, strict=True):
            part += share_BE.sum(0)
            if unit_size is not None:
                total += part // unit_size
                part.zero_()
        self._shares = []

    def add_noise(self, secret: bytes) -> None:
        """Noise the step's sums, every expert's, and add them to what is released. The secret is for this step only."""
        std = self.noise_multiplier * self.sensitivity * 2.0**GRID_BITS
        noise = standard_normal(secret, sum(map(len, self._sums))).mul_(std).round_()
        for released, total, part in zip(self._released, self._sums, noise.split(self._sizes), strict=True):
            released += part + total
            total.zero_()

    def take_sums(self) -> Tensor:
        """Return the sums of the step before any noise, float64, all layers in one: for audits. Never release them."""
        sums = torch.cat(self._sums).double() * 2.0**-GRID_BITS
        self.begin_step()
        return sums

    def released(self) -> dict[str, Tensor]:
        """Return the sums over the steps so far, noise included: name → float32 [E]."""
        return {load_name(n): (total * 2.0**-GRID_BITS).float() for n, total in enumerate(self._released)}

    @property
    def _sizes(self) -> list[int]:
        return [len(total) for total in self._sums]

    def _on_forward(
        self, number: int, layer: nn.Module, inputs: tuple[object, ...], output: tuple[Tensor, Routing]
    ) -> None:
        if self._watched is None:
            return
        example_B, batch = self._watched
        place_B = self._place_B[torch.searchsorted(self._sorted_B, example_B)]
        self._shares[number][place_B] = token_shares(output[1], len(self._sums[number]), batch).cpu()


def token_shares(routing: Routing, held: int, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the share of each example's tokens that chose each expert, int64 [B, held], in steps of 2^-30.

    Rounded down, entries are at most one whole and sum to at most K wholes, whatever the routing holds. An example
    without tokens has zeros.
    """
    experts_BTK = routing.experts_BTK
    examples, tokens, _ = experts_BTK.shape
    counted_BTK = torch.ones_like(experts_BTK) if routing.used_BTK is None else routing.used_BTK.long()
    present_BT = present_tokens(batch, tokens)
    tokens_B1 = experts_BTK.new_full((examples, 1), tokens)
    if present_BT is not None:
        counted_BTK = counted_BTK * present_BT.unsqueeze(-1)
        tokens_B1 = present_BT.sum(1, keepdim=True)
    count_BE = experts_BTK.new_zeros(examples, held)
    count_BE.scatter_add_(1, experts_BTK.flatten(1), counted_BTK.flatten(1))
    return (count_BE.minimum(tokens_B1) << GRID_BITS) // tokens_B1.clamp(min=1)
