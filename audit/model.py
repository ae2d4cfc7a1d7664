"""The model of a scenario, or a model of the caller's own, prepared for a model audit. No private data is needed."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from conclave.audit.releases import audit_releases
from conclave.base.errors import BadInputError
from conclave.clients.trainer import mechanism_of
from conclave.model import parameters
from conclave.model.building import build
from conclave.privacy.audit.model import audit_model
from conclave.privacy.audit.subject import Finding, Subject, said
from conclave.privacy.gradients.modes import ExampleLoss
from conclave.privacy.training.dpsgd_mechanism import DpSgd
from conclave.server.scenario import Scenario

_EXAMPLES = 8
_FEWEST, _MOST = 4, 16
_DECLARED_SIZE = 100
USUAL = DpSgd(
    steps=1, learning_rate=1.0, sampling_rate=0.1, clip=1.0, noise_multiplier=1.0, declared_size=_DECLARED_SIZE
)
"""What a model that comes without a mechanism is trained with: flat clipping at C = 1, σ = 1, q = 0.1."""


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
    """Audit what ``module:function`` builds; see :func:`audit_built`. Modules are also looked for where the caller is.

    Raises:
        BadInputError: there is no such function, it fails, or it returns something that cannot be audited.
    """
    sys.path.insert(0, str(Path.cwd()))
    try:
        with _of_the_callers(path):
            build = pkgutil.resolve_name(path)  # importing runs the caller's code
    finally:
        sys.path.pop(0)
    return audit_built(build, USUAL, where=path)


def audit_built(build: Callable[[], object], mechanism: DpSgd, *, where: str) -> list[Finding]:
    """Audit what a function builds: (module, example_loss, batch of at least 4 examples). It is called several times.

    It may also return (module, batch) where the module has a method ``loss``. Of a larger batch 16 examples are looked
    at.

    Args:
        where: the function's name, for errors.

    Raises:
        BadInputError: it fails, or it returns something that cannot be audited.
    """
    module, loss, batch = _built(build, where)
    try:
        return audit_module(module, loss, batch, mechanism, rebuild=lambda: _built(build, where)[:2])
    except BadInputError as error:
        raise BadInputError(f"{where}: {error}") from error


def audit_module(
    module: nn.Module,
    example_loss: ExampleLoss,
    records: Mapping[str, Tensor],
    mechanism: DpSgd,
    *,
    rebuild: Callable[[], tuple[nn.Module, ExampleLoss]] | None = None,
) -> list[Finding]:
    """Audit any torch model with its loss, on at least 4 records; of more, 16 are looked at.

    Args:
        records: named tensors, each with the record as its first axis.
        rebuild: makes model and loss once more; what they may hold where Python does not show it is then found too.

    Raises:
        BadInputError: they cannot be audited.
    """
    if wrong := _wrong_with(records):
        raise BadInputError(f"a batch that {wrong}, must be named tensors with {_FEWEST} or more examples")
    return audit_model(Subject(module, example_loss, _some(records), mechanism, rebuild=rebuild))


@contextmanager
def _of_the_callers(name: str) -> Iterator[None]:
    """Run the caller's code; whatever it raises is bad input."""
    try:
        yield
    except Exception as error:
        raise BadInputError(f"{name} cannot be called: {said(error)}") from error
    except SystemExit as error:
        raise BadInputError(f"{name} cannot be called: it ends the process") from error


def _built(build: Callable[[], object], name: str) -> tuple[nn.Module, ExampleLoss, Mapping[str, Tensor]]:
    with _of_the_callers(name):
        built = build()
    must = f"{name} must return (module, example_loss, batch of named tensors with {_FEWEST} or more examples)"
    if isinstance(built, tuple) and len(built) == 2 and callable(getattr(built[0], "loss", None)):
        built = (built[0], built[0].loss, built[1])
    if not (isinstance(built, tuple) and len(built) == 3):
        raise BadInputError(f"{must}, not {_kind(built)}")
    module, loss, batch = built
    if not isinstance(module, nn.Module):
        raise BadInputError(f"{must}; its module is {_kind(module)}")
    if not callable(loss):
        raise BadInputError(f"{must}; its example_loss is {_kind(loss)}, which cannot be called")
    if wrong := _wrong_with(batch):
        raise BadInputError(f"{must}; its batch {wrong}")
    return module, loss, batch


def _kind(value: object) -> str:
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else type(value).__name__


def _wrong_with(batch: object) -> str | None:
    """Say what is wrong with a batch; None if nothing is."""
    if not isinstance(batch, Mapping) or not batch:
        return f"is {'empty' if isinstance(batch, Mapping) else _kind(batch)}"
    for name, tensor in batch.items():
        if not isinstance(name, str):
            return f"has the key {name!r}, which is no name"
        if not isinstance(tensor, Tensor):
            return f"has {type(tensor).__name__} at {name}"
        if tensor.dim() == 0 or tensor.layout != torch.strided or tensor.device.type == "meta":
            return f"has a tensor at {name} whose first axis is not the example"
    sizes = {name: len(tensor) for name, tensor in batch.items()}
    if len(set(sizes.values())) > 1:
        return f"has {' and '.join(f'{size} at {name}' for name, size in sizes.items())}"
    if (examples := next(iter(sizes.values()))) < _FEWEST:
        return f"has {examples}"
    return None


def _some(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take examples from all over the batch, as values: what they were computed from is not trained."""
    examples = len(next(iter(batch.values())))
    chosen = torch.linspace(0, examples - 1, min(examples, _MOST)).long()
    return {name: tensor.detach()[chosen.to(tensor.device)] for name, tensor in batch.items()}
