"""What a model audit looks at, and what it reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from conclave.base.verdict import Verdict
from conclave.model.records import Records
from conclave.privacy.gradients.modes import ExampleLoss
from conclave.privacy.gradients.unit_index import UnitIndex
from conclave.privacy.randomness import derive
from conclave.privacy.training.dpsgd_mechanism import DpSgd
from conclave.privacy.training.private_training import PrivateTraining

Start = Callable[[nn.Module, torch.optim.Optimizer, ExampleLoss, DpSgd, bytes], PrivateTraining]


@dataclass(frozen=True)
class Subject:
    """A model, its loss, synthetic records, and the mechanism it is to be trained with.

    start: makes the training under audit; the real one unless a test puts a broken one in its place.
    rebuild: makes model and loss once more, as they were before any use; None if they cannot be rebuilt.
    """

    module: nn.Module
    example_loss: ExampleLoss
    records: Records
    mechanism: DpSgd
    start: Start = PrivateTraining
    rebuild: Callable[[], tuple[nn.Module, ExampleLoss]] | None = None

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

    def try_training(self) -> None:
        """Start training, up to its first record.

        Raises:
            BadInputError: training refuses the model, by its layers or because a gradient is not accounted for.
        """
        self.sums(torch.arange(0))

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
    """The outcome of one check.

    violation: what was seen that contradicts the claim; None if nothing does.
    incomplete: why the check, or a part of it, could not be run; None if all of it was.
    """

    check: str
    looked_at: str
    violation: str | None = None
    incomplete: str | None = None

    @property
    def verdict(self) -> Verdict:
        """A counter-example counts, whatever else could not be run."""
        if self.violation is not None:
            return "VIOLATED"
        return "NOT_REFUTED" if self.incomplete is None else "INCOMPLETE"


def verdict_of(findings: Iterable[Finding]) -> Verdict:
    """Return the verdict of all findings together."""
    found = {finding.verdict for finding in findings}
    if "VIOLATED" in found:
        return "VIOLATED"
    return "INCOMPLETE" if "INCOMPLETE" in found else "NOT_REFUTED"


def said(error: BaseException) -> str:
    """Return an exception as one line of bounded length."""
    lines = str(error).strip().splitlines()
    line = lines[0] if lines else ""
    return f"{type(error).__name__}: {line[:200]}" if line else type(error).__name__


def length(difference: Tensor) -> float:
    """Return the L2 norm of a difference; infinite if it is NaN, so that no later one can hide it."""
    norm = float(difference.norm())
    return norm if norm == norm else math.inf


def all_but(examples: int, one: int) -> Tensor:
    """Return the indices of all examples except one."""
    return torch.tensor([i for i in range(examples) if i != one], dtype=torch.int64)
