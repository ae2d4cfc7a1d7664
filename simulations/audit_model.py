"""The model of a scenario, or one of the caller's own, made ready for a model audit. No data is needed."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from clients.trainer import mechanism_of
from model import build, parameters
from model.errors import BadInputError
from privacy.audit.model import audit_model
from privacy.audit.subject import Finding, Subject
from privacy.dpsgd import DpSgd
from server.scenario import Scenario
from simulations.audit_releases import audit_releases

_EXAMPLES = 8
_DECLARED_SIZE = 100


def audit_scenario(scenario: Scenario) -> list[Finding]:
    """Audit a scenario's model with its mechanism, on synthetic records of its schema.

    Raises:
        BadInputError: the scenario has no privacy to audit.
    """
    plan = scenario.plan()
    if plan.noise_multiplier is None:
        raise BadInputError("privacy.mechanism is none, so there is nothing to audit; must be gaussian")
    network = build(plan.model, scenario.seed)
    generator = torch.Generator().manual_seed(scenario.seed)
    with torch.no_grad():  # what starts at zero, or as copies, would hide what lies behind it
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    batch = network.synthetic_batch(_EXAMPLES)
    findings = audit_model(Subject(network, network.loss, batch, mechanism_of(plan, _DECLARED_SIZE)))
    if plan.affinity is None and plan.evaluation is None:
        return findings
    tensors = {name: tensor.detach() for name, tensor in parameters.split(network.state_dict(), network.held).items()}
    return findings + audit_releases(plan, tensors, batch)


def audit_own(path: str) -> list[Finding]:
    """Audit what ``module:function`` builds: (module, example_loss, batch of at least 4 examples).

    The function may also return (module, batch) where the module has a method ``loss``. It is trained with flat
    clipping at C = 1, σ = 1, q = 0.1.

    Raises:
        BadInputError: there is no such function, or it returns something else.
    """
    sys.path.insert(0, str(Path.cwd()))
    try:
        built = pkgutil.resolve_name(path)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise BadInputError(f"{path} cannot be called: {error}") from error
    finally:
        sys.path.pop(0)
    if isinstance(built, tuple) and len(built) == 2 and callable(getattr(built[0], "loss", None)):
        built = (built[0], built[0].loss, built[1])
    if not (isinstance(built, tuple) and len(built) == 3 and isinstance(built[0], nn.Module) and _is_batch(built[2])):
        raise BadInputError(
            f"{path} must return (module, example_loss, batch of named tensors with 4 or more examples)"
        )
    module, loss, batch = built
    mechanism = DpSgd(
        steps=1,
        learning_rate=1.0,
        sampling_rate=0.1,
        clip=1.0,
        noise_multiplier=1.0,
        declared_size=_DECLARED_SIZE,
    )
    return audit_model(Subject(module, loss, batch, mechanism))


def _is_batch(batch: object) -> bool:
    if not isinstance(batch, Mapping) or not batch or not all(isinstance(t, torch.Tensor) for t in batch.values()):
        return False
    tensors: list[Tensor] = list(batch.values())
    return len({len(t) for t in tensors if t.dim()}) == 1 and all(t.dim() for t in tensors) and len(tensors[0]) >= 4
