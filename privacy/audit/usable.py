"""What can be audited at all: said in one sentence before anything is run, or by the first run."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from conclave.base.errors import BadInputError
from conclave.privacy.audit.observed import losses_of
from conclave.privacy.audit.subject import Subject, said


def refuse_unusable(subject: Subject) -> None:
    """Look at the parameters, and take the losses of all records once.

    Raises:
        BadInputError: nothing is trained, a parameter has no shape yet, or the loss fails, is not one finite value per
            example, or does not depend on what is trained.
    """
    trained = []
    for name, parameter in subject.module.named_parameters():
        if is_lazy(parameter):
            raise BadInputError(
                f"parameter {name} has no shape yet (a lazy module); run the model on a batch before it is returned"
            )
        if parameter.requires_grad:
            trained.append(parameter)
    if not trained:
        raise BadInputError("nothing is trained: no parameter of the module requires a gradient")
    loss_B = _losses(subject)
    if not loss_B.requires_grad or all(g is None for g in _gradients(loss_B, trained)):
        raise BadInputError("example_loss does not depend on any parameter that is trained; must not be detached")


def _gradients(loss_B: Tensor, trained: list[nn.Parameter]) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(loss_B.sum(), trained, allow_unused=True)
    except Exception as error:  # of what changes values in place that the gradient needs, of a backward pass of its own
        raise BadInputError(f"the gradient of example_loss cannot be taken: {said(error)}") from error


def _losses(subject: Subject) -> Tensor:
    n = subject.examples
    allowed = f"must be a tensor with one loss per example: [{n}], or [{n}, tasks]"
    try:
        loss_B: object = losses_of(subject)(subject.records, torch.arange(n))
    except BadInputError:
        raise
    except Exception as error:  # whatever code that was brought may raise
        raise BadInputError(f"example_loss fails on the batch that was returned with it: {said(error)}") from error
    if not isinstance(loss_B, Tensor):
        raise BadInputError(f"example_loss returns {type(loss_B).__name__}, {allowed}")
    if loss_B.dim() not in (1, 2) or len(loss_B) != n:
        hint = '; use reduction="none"' if loss_B.dim() == 0 else ""
        raise BadInputError(f"example_loss returns a tensor of shape {list(loss_B.shape)}, {allowed}{hint}")
    if not loss_B.is_floating_point():
        raise BadInputError(f"example_loss returns {loss_B.dtype}, must be a floating-point type")
    if not bool(loss_B.isfinite().all()):
        bad = int((~loss_B.detach().reshape(n, -1).isfinite().all(1)).nonzero()[0])
        raise BadInputError(f"the loss of example {bad} of the batch is not finite; must be")
    return loss_B
