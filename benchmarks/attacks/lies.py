"""What a hostile node sends in place of its delta: one function for each kind of lie.

The adaptive kinds know everything: the server's noise test, what it remembers of the node, and the gradient of all the
federation's records at the weights that were sent. They send the most harmful delta of their kind that still passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from conclave.clients.trainer import train
from conclave.model.records import Records
from conclave.protocol.codec import norms
from conclave.protocol.messages import TrainRequest
from conclave.protocol.plan import Plan
from conclave.server.replies.config import NoiseTestConfig
from conclave.server.replies.noise_likeness import NoiseTest
from conclave.server.replies.public_noise import PublicNoise
from conclave.server.replies.validation import norm_bound

Delta = dict[str, Tensor]


def first_of(delta: Delta, group: str, change: Callable[[Tensor], Tensor]) -> Delta:
    name = next(n for n in sorted(delta) if n.startswith(group))
    return delta | {name: change(delta[name])}


def unassigned(delta: Delta, request: TrainRequest) -> Delta:
    mine = request.held[0][0]
    other = next(e for e in range(request.plan.model.experts.routed) if e not in request.held[0])
    return {n.replace(f"/0/{mine}/", f"/0/{other}/"): t for n, t in delta.items()}


def as_long_as_may_be(direction: Delta, honest: Delta, plan: Plan, size: int, round_number: int) -> Delta:
    """Scale a direction to ten times the honest delta's norm, or to just below the bound if that is less."""
    count = sum(t.numel() for t in honest.values())
    norm = min(10.0 * math.hypot(*norms(honest)), 0.999 * norm_bound(plan, count, size, round_number))
    factor = norm / math.hypot(*norms(direction))
    return {n: factor * t for n, t in direction.items()}


def most_that_passes(passes: Callable[[float], bool], most: float) -> float | None:
    """Return nearly the largest amount up to ``most`` that passes, of sixteen and by bisection above; None if none."""
    step = most / 16.0
    for number in range(16, 0, -1):
        if passes(number * step):
            low, high = number * step, min(most, (number + 1) * step)
            for _ in range(5):
                middle = (low + high) / 2.0
                low, high = (middle, high) if passes(middle) else (low, middle)
            return low
    return 0.0 if passes(0.0) else None


class AdaptiveLiar:
    """A node that lies as far as the noise test lets it, in one direction.

    * ``minus-gradient``: fresh noise, less a multiple of the step that would help everyone.
    * ``plus-constant``: fresh noise, plus the same in every coordinate.
    * ``shaped``: exactly normal values, put in such an order that they follow the direction that harms everyone.
    * ``shaped-own``: the same of a liar that has its own records only.
    """

    KINDS = ("minus-gradient", "plus-constant", "shaped", "shaped-own")

    def __init__(self, kind: str, config: NoiseTestConfig, records: Records) -> None:
        """Lie in the way of ``kind``; ``records`` are everyone's."""
        self.kind, self._config, self._records = kind, config, records
        self._test: NoiseTest | None = None
        self._generator = torch.Generator().manual_seed(17)
        self.harm: list[float] = []

    def lie(self, request: TrainRequest, weights: Mapping[str, Tensor], size: int, own: Records) -> Delta | None:
        """Return the delta to send, and note how far it goes along the harmful direction; None where nothing passes."""
        records = own if self.kind == "shaped-own" else self._records
        plan, held = request.plan, request.held
        self._test = self._test or NoiseTest(plan, self._config)
        test, std = self._test, PublicNoise.of(plan, size, 1.0, 1e-9).std
        shapes = {name: tensor.shape for name, tensor in weights.items()}
        if self.kind == "plus-constant":
            harm = torch.ones(sum(shape.numel() for shape in shapes.values()))
        else:
            open_plan = plan.model_copy(update={"noise_multiplier": None})
            step = train(open_plan, held, weights, records, size, bytes(32)).delta
            harm = -torch.cat([step[name].flatten() for name in shapes])
        harm /= torch.linalg.vector_norm(harm)
        noise = torch.randn(len(harm), generator=self._generator)

        def delta_of(z: Tensor) -> Delta:
            parts = (z * std).split([shape.numel() for shape in shapes.values()])
            return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

        def passes(z: Tensor) -> bool:
            return test.flaw("liar", test.standardise(held, delta_of(z), size)) is None

        best: Tensor | None = None
        for build in self._families(harm, noise):
            amount = most_that_passes(lambda a, build=build: passes(build(a)), 1.0)  # type: ignore[misc]
            if amount is not None and (best is None or build(amount) @ harm > best @ harm):
                best = build(amount)
        if best is None:
            return None
        self.harm.append(float(best @ harm))
        test.remember("liar", test.standardise(held, delta_of(best), size))
        return delta_of(best)

    def _families(self, harm: Tensor, noise: Tensor) -> list[Callable[[float], Tensor]]:
        """Return maps from an amount in [0, 1] to standardised deltas, the more harmful the larger it is."""
        length = math.sqrt(len(harm))
        if not self.kind.startswith("shaped"):
            return [
                lambda a, k=k: k * noise + 1.2 * length * a * harm  # type: ignore[misc]
                for k in (1.0, 0.9, 0.7, 0.4)
            ]
        quantiles = torch.special.ndtri((torch.arange(len(harm), dtype=torch.float64) + 0.5) / len(harm)).float()

        def shaped(amount: float, factor: float) -> Tensor:
            ranks = harm.sign() * harm.abs().argsort().argsort() / len(harm)  # a gradient's tail is not a normal one
            order = (amount * ranks + (1.0 - amount) * noise).argsort()
            return factor * torch.empty_like(noise).index_copy_(0, order, quantiles)

        return [lambda a, f=f: shaped(a, f) for f in (1.0, 1.04)]  # type: ignore[misc]
