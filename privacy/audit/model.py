"""`audit model`: look for a counter-example to the claim, for one model and mechanism.

Synthetic records are enough: what is checked are properties of the computation, not of data. A passed audit proves
nothing; a violation is a counter-example.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from model.errors import BadInputError
from privacy.audit.faults import check_faults
from privacy.audit.isolation import check_gradients, check_isolation, check_state
from privacy.audit.loads import check_load_noise, check_load_sensitivity
from privacy.audit.sampling_and_noise import check_noise, check_participation
from privacy.audit.sensitivity import check_numerics, check_sensitivity
from privacy.audit.subject import Finding, Subject

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


def audit_model(subject: Subject) -> list[Finding]:
    """Run all checks; the model's state is put back after each.

    A check that the model makes impossible (its loss fails on a batch of one, say) is a violation with the reason.
    """
    mode = subject.module.training
    try:
        with torch.random.fork_rng():  # checks fix torch's generator; the caller's goes on as it was
            return _audit(subject)
    finally:
        subject.module.train(mode)


def _audit(subject: Subject) -> list[Finding]:
    before = copy.deepcopy(subject.module.state_dict())
    try:
        with subject.training():
            pass
    except BadInputError as refusal:  # a layer that couples examples or keeps state: nothing else can be run
        return [Finding("layers", "every layer by name", str(refusal))]
    findings = [Finding("layers", "every layer by name")]
    checks = CHECKS | (LOAD_CHECKS if subject.mechanism.load_share else {})
    for name, check in checks.items():
        try:
            findings.append(check(subject))
        except (BadInputError, RuntimeError, ValueError) as error:
            findings.append(Finding(name, "could not be run", f"{type(error).__name__}: {error}".splitlines()[0]))
        subject.module.load_state_dict(before)
    return findings
