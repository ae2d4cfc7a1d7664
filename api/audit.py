"""Audits of models from Python."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, overload

from torch import Tensor, nn

from conclave.api.scenario import Scenario
from conclave.audit.model import USUAL, audit_built, audit_module, audit_scenario
from conclave.base.errors import BadInputError
from conclave.base.verdict import Verdict
from conclave.privacy.audit.subject import Finding, verdict_of
from conclave.privacy.gradients.modes import ExampleLoss
from conclave.privacy.training.make_private import check_options


@dataclass(frozen=True)
class ModelAudit:
    """What the audit of a model found, one finding a check.

    verdict: ``VIOLATED`` where a check found a counter-example, ``INCOMPLETE`` where one could not be run, else
        ``NOT_REFUTED``: that proves nothing.
    """

    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> Verdict:
        """The verdict of all findings together."""
        return verdict_of(self.findings)


@overload
def audit_model(subject: Scenario | str | os.PathLike[str]) -> ModelAudit: ...
@overload
def audit_model(subject: Callable[[], object], **mechanism: Any) -> ModelAudit: ...
@overload
def audit_model(
    subject: nn.Module, example_loss: ExampleLoss, records: Mapping[str, Tensor], **mechanism: Any
) -> ModelAudit: ...
def audit_model(
    subject: Scenario | str | os.PathLike[str] | nn.Module | Callable[[], object],
    example_loss: ExampleLoss | None = None,
    records: Mapping[str, Tensor] | None = None,
    **mechanism: Any,
) -> ModelAudit:
    """Attack a model's private training: look for a unit that follows its company, a sum that moves too far, and more.

    >>> import conclave, torch
    >>> model = torch.nn.Linear(300, 100)
    >>> def example_loss(batch):
    ...     scores = model(batch["x"])
    ...     return (scores - scores.mean()).square().mean(1)  # the mean is the whole batch's
    >>> audit = conclave.audit_model(model, example_loss, {"x": torch.randn(8, 300)})
    >>> audit.verdict
    'VIOLATED'
    >>> "isolation" in {finding.check for finding in audit.findings if finding.violation}
    True

    Args:
        subject: a scenario, by name or file too: its model with its mechanism, on made-up records. Or any torch module.
            Or a function without arguments that builds (module, example_loss, records), best for your own: it is called
            several times, and what a model may hold where Python does not show it is then found too.
        example_loss: of a module; maps a batch to one loss per example, [B].
        records: of a module; named tensors of at least 4 records, made-up ones will do.
        mechanism: of a module or a function, options as of :func:`conclave.make_private`; by default σ = 1, q = 0.1,
            C = 1.

    Raises:
        BadInputError: it cannot be audited.
    """
    if isinstance(subject, Scenario | str | os.PathLike):
        if example_loss is not None or records is not None or mechanism:
            raise BadInputError("a scenario brings its own loss, records and mechanism, must be given alone")
        scenario = subject if isinstance(subject, Scenario) else Scenario.read(subject)
        return ModelAudit(tuple(audit_scenario(scenario)))
    check_options(mechanism)
    options = replace(USUAL, **mechanism)
    if not isinstance(subject, nn.Module):
        return ModelAudit(tuple(audit_built(subject, options, where=getattr(subject, "__name__", "the function"))))
    if not callable(example_loss) or records is None:
        raise BadInputError("a module is audited with an example_loss and records, must be given both")
    return ModelAudit(tuple(audit_module(subject, example_loss, records, options)))
