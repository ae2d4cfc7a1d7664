"""`audit model`: look for a counter-example to the claim, for one model and mechanism.

Synthetic records are enough: what is checked are properties of the computation, not of data. A passed audit proves
nothing; a violation is a counter-example.
"""

from __future__ import annotations

from collections.abc import Callable

from conclave.base.errors import BadInputError
from conclave.privacy.audit.faults import check_faults
from conclave.privacy.audit.isolation import check_gradients, check_isolation, check_state
from conclave.privacy.audit.loads import check_load_noise, check_load_sensitivity
from conclave.privacy.audit.memory import Memory
from conclave.privacy.audit.observed import callers_randomness_untouched, kept
from conclave.privacy.audit.sampling_and_noise import check_noise, check_participation
from conclave.privacy.audit.sensitivity import check_numerics, check_sensitivity
from conclave.privacy.audit.subject import Finding, Subject, said
from conclave.privacy.audit.usable import refuse_unusable

CHECKS: dict[str, Callable[[Subject], Finding]] = {
    "gradients": check_gradients,
    "isolation": check_isolation,
    "state": check_state,
    "sensitivity": check_sensitivity,
    "numerics": check_numerics,
    "participation": check_participation,
    "noise": check_noise,
    "faults": check_faults,
}
LOAD_CHECKS: dict[str, Callable[[Subject], Finding]] = {
    "load sensitivity": check_load_sensitivity,
    "load noise": check_load_noise,
}
"""Where the mechanism releases expert loads beside the gradient."""


BLACK_BOX = ("isolation", "state")
"""What needs the model alone, and no training of it."""


def audit_model(subject: Subject) -> list[Finding]:
    """Run all checks; model and loss are restored after each.

    Every check reports. One that cannot be run, whatever the reason, is incomplete and says why; the others still run.

    Raises:
        BadInputError: model, loss and records cannot be trained at all; see
            :mod:`conclave.privacy.audit.usable`.
    """
    mode = subject.module.training
    try:
        with callers_randomness_untouched(), kept(subject) as memory:
            refuse_unusable(subject)
            memory.restore()
            return _audit(subject, memory)
    finally:
        subject.module.train(mode)


def _audit(subject: Subject, memory: Memory) -> list[Finding]:
    refused = None
    try:
        subject.try_training()
    except Exception as error:  # layers that couple examples or keep state, or a gradient that cannot be told by unit
        refused = str(error) if isinstance(error, BadInputError) else said(error)
    checks = CHECKS | (LOAD_CHECKS if subject.mechanism.load_share else {})
    if refused is not None:
        checks = {name: check for name, check in checks.items() if name in BLACK_BOX}
    findings = []
    for name, check in checks.items():
        memory.restore()
        findings.append(_run(name, check, subject))
    return [_layers(refused, findings), *findings]


def _run(name: str, check: Callable[[Subject], Finding], subject: Subject) -> Finding:
    try:
        return check(subject)
    except BadInputError as refusal:
        return Finding(name, "could not be run", incomplete=str(refusal))
    except Exception as error:  # of code that was brought, or of a layer that the engine does not know
        return Finding(name, "could not be run", incomplete=said(error))


def _layers(refused: str | None, findings: list[Finding]) -> Finding:
    """A refusal is a counter-example only where the attack found one: of some layers only the name is known."""
    looked_at = "every layer by name"
    if refused is None:
        return Finding("layers", looked_at)
    if any(finding.violation for finding in findings):
        return Finding("layers", looked_at, refused)
    return Finding("layers", looked_at, incomplete=f"training refuses it: {refused}")
