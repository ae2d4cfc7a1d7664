"""What a model audit looks at, and what it reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from privacy.dpsgd import DpSgd, PrivateTraining
from privacy.gradient_modes import ExampleLoss, Records
from privacy.randomness import derive
from privacy.unit_index import UnitIndex

Start = Callable[[nn.Module, torch.optim.Optimizer, ExampleLoss, DpSgd, bytes], PrivateTraining]


@dataclass(frozen=True)
class Subject:
    """A model, its loss, synthetic records, and the mechanism it is to be trained with.

    start: makes the training under audit; the real one unless a test puts a broken one in its place.
    """

    module: nn.Module
    example_loss: ExampleLoss
    records: Records
    mechanism: DpSgd
    start: Start = PrivateTraining

    @property
    def examples(self) -> int:
        """How many records there are."""
        return len(next(iter(self.records.values())))

    def training(
        self, mechanism: DpSgd | None = None, *, loss: ExampleLoss | None = None, run: int = 0
    ) -> PrivateTraining:
        """Start training anew; ``run`` names the secret."""
        optimizer = torch.optim.SGD([p for p in self.module.parameters() if p.requires_grad], lr=0.0)
        secret = derive(bytes(32), "audit", run)
        return self.start(self.module, optimizer, loss or self.example_loss, mechanism or self.mechanism, secret)

    def sums(
        self,
        examples: Tensor,
        mechanism: DpSgd | None = None,
        *,
        loss: ExampleLoss | None = None,
        records: Records | None = None,
    ) -> Tensor:
        """Return the clipped sum of some records as one float64 vector, without noise."""
        torch.manual_seed(0)  # a model that draws from the global stream must not look different by chance
        with self.training(mechanism, loss=loss) as training:
            parts = training.sums_without_noise(records or self.records, UnitIndex(self.examples), examples)
        return torch.cat([part.flatten() for part in parts])


@dataclass(frozen=True)
class Finding:
    """The outcome of one check: ``violation`` says what was seen, None where nothing speaks against the claim."""

    check: str
    looked_at: str
    violation: str | None = None


def all_but(examples: int, one: int) -> Tensor:
    """Return the indices of all examples except one."""
    return torch.tensor([i for i in range(examples) if i != one], dtype=torch.int64)
