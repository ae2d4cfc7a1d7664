"""Models of the user's own: a torch module that ``module:function`` builds, trained like the family's.

The function is called with the model's configuration and the experts to hold, ``build(config, held) -> nn.Module``. The
module maps a batch's ``image``, ``text`` or ``table`` to scores: [B, classes], or [B, T, 256] for the next byte.
Parameters named ``…layers.<layer>.experts.<id>.…`` belong to that expert, with global ids, and only those of ``held``
may be there; all others are shared weights. A parameter that several layers use (``head.weight = embed.weight``) is one
parameter: it travels once, under its first name, and is one parameter again wherever the model is built.

Naming code means naming what runs next to private data. A node therefore builds only what its owner allows by name
(``policy.models``), and never because a server says so.
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Mapping
from types import CoroutineType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.nn.parameter import is_lazy

from conclave.base.errors import BadInputError
from conclave.model.config import ModelConfig
from conclave.model.experts.config import HeldExperts
from conclave.model.heads.config import ClassificationConfig
from conclave.model.heads.scores import byte_loss
from conclave.model.network import Network, Output
from conclave.model.records import Batch

PREFIX = "own."
BYTES = 256
EXPERT = re.compile(r"own\.(?:.*\.)?layers\.(?P<layer>\d+)\.experts\.(?P<expert>\d+)\..+")


class OwnNetwork(Network):
    """The user's module behind the interface of the family's models."""

    def __init__(self, config: ModelConfig, held: HeldExperts) -> None:
        """Build the module.

        Raises:
            BadInputError: the function cannot be called, fails or returns something else; the module holds buffers,
                parameters without a shape, other than float32 ones, other experts than it was asked for, or parameters
                that share memory.
        """
        nn.Module.__init__(self)
        self.config = config
        self.held = held
        self.own = _build(config, held)
        _check(self, config, held)
        self._first_name = _first_names(self)
        self.register_state_dict_post_hook(_once)  # type: ignore[no-untyped-call]  # of torch

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load every parameter under its first name, as :meth:`state_dict` gives them; arguments as torch's.

        torch would load each name by itself: one parameter of several names would come apart where tensors are
        assigned, and layers that rename parameters (Opacus's recurrent ones) would keep some of their old ones.

        Raises:
            RuntimeError: a name is missing or unexpected, or a shape differs.
        """
        places: dict[str, list[str]] = {name: [name] for name, _ in self.named_parameters()}
        for name, first in self._first_name.items():
            places[first].append(name)
        missing, unexpected = sorted(places.keys() - state_dict.keys()), sorted(state_dict.keys() - places.keys())
        if strict and (missing or unexpected):
            raise RuntimeError(f"missing: {missing}; unexpected: {unexpected}")
        for first in places.keys() & state_dict.keys():
            before, after = self.get_parameter(first), state_dict[first]
            if before.shape != after.shape:
                raise RuntimeError(f"{first} has shape {list(after.shape)}, must have {list(before.shape)}")
            if not assign:
                with torch.no_grad():
                    before.copy_(after)
                continue
            one = nn.Parameter(after, requires_grad=before.requires_grad)
            for name in places[first]:
                owner, _, key = name.rpartition(".")
                self.get_submodule(owner)._parameters[key] = one
        return _IncompatibleKeys(missing, unexpected)

    def forward(self, batch: Batch, allowed: Mapping[int, Tensor] | None = None) -> Output:
        """Return the module's scores; it has no auxiliary loss, and its routing is not looked at.

        Raises:
            BadInputError: they are not what the head needs.
        """
        del allowed
        x = batch[self.config.encoder.modality]
        try:
            scores = self.own(x)
        except SystemExit as error:  # it would end a node, whatever the record was that it came from
            raise BadInputError(f"model.source {self.config.source} ends the program: {said(error)}") from error
        head = self.config.head
        expected = [len(x), head.classes] if isinstance(head, ClassificationConfig) else [*x.shape, BYTES]
        if not isinstance(scores, Tensor) or list(scores.shape) != expected or not scores.is_floating_point():
            is_now = f"{list(scores.shape)} of {scores.dtype}" if isinstance(scores, Tensor) else type(scores).__name__
            raise BadInputError(
                f"model.source {self.config.source}: the scores of {len(x)} examples are {is_now}, must be floats "
                f"{expected} for model.head.kind {head.kind}"
            )
        return Output(scores, scores.new_zeros(len(scores)), ())

    def task_loss(self, output: Output, batch: Batch) -> Tensor:
        """Return the loss of each example, shape [B], in nats."""
        if isinstance(self.config.head, ClassificationConfig):
            return F.cross_entropy(output.scores, batch["label"], reduction="none")
        return byte_loss(output.scores, batch, ahead=1)

    def loss(self, batch: Batch) -> Tensor:
        """Return the training loss of each example, shape [B]."""
        return self.task_loss(self(batch), batch)


def _build(config: ModelConfig, held: HeldExperts) -> nn.Module:
    source = str(config.source)
    try:
        function = pkgutil.resolve_name(source)
    except (Exception, SystemExit) as error:  # of whatever kind: importing runs the user's code
        raise BadInputError(f"model.source {source} cannot be called: {said(error)}") from error
    try:
        built = function(config, dict(held))
    except (Exception, SystemExit) as error:
        raise BadInputError(f"model.source {source} cannot be called: {said(error)}") from error
    if not isinstance(built, nn.Module):
        if isinstance(built, CoroutineType):
            built.close()  # or Python would warn that nobody awaits it
        raise BadInputError(f"model.source {source} must return a torch module, not a {type(built).__name__}")
    return built


def said(error: BaseException) -> str:
    """Return what an exception of the user's code says, in one line."""
    try:
        text = "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))
    except Exception:  # it is the user's code that says it
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _check(network: OwnNetwork, config: ModelConfig, held: HeldExperts) -> None:
    source = config.source
    buffers = [name.removeprefix(PREFIX) for name, _ in network.named_buffers()]
    if buffers:
        raise BadInputError(
            f"model.source {source}: {buffers[0]} is a buffer, must not be: training may change no state"
        )
    for name, parameter in network.named_parameters():
        short = name.removeprefix(PREFIX)
        if is_lazy(parameter):
            raise BadInputError(
                f"model.source {source}: {short} has no shape before the first batch, must have one: "
                "give its layer all sizes, as nn.Linear for nn.LazyLinear"
            )
        if parameter.dtype != torch.float32 or not parameter.dim() or "/" in name:
            raise BadInputError(
                f"model.source {source}: {short} must be a float32 tensor with an axis and no / in its name"
            )
        match = EXPERT.fullmatch(name)
        if match is not None and int(match["expert"]) not in held.get(int(match["layer"]), ()):
            raise BadInputError(f"model.source {source}: {short} is of an expert that is not held, must be left out")
    _check_shared(network, source)


def _check_shared(network: OwnNetwork, source: str | None) -> None:
    """Refuse what could not be put together again: a parameter with two owners, two parameters that share memory."""
    for name, first in _first_names(network).items():
        if _expert(name) != _expert(first):
            raise BadInputError(
                f"model.source {source}: {name.removeprefix(PREFIX)} and {first.removeprefix(PREFIX)} are one "
                "parameter, must belong to the same expert, or both to none"
            )
    holder: dict[int, str] = {}
    for name, parameter in network.named_parameters():
        other = holder.setdefault(parameter.untyped_storage().data_ptr(), name)
        if other != name and parameter.numel():
            raise BadInputError(
                f"model.source {source}: {name.removeprefix(PREFIX)} and {other.removeprefix(PREFIX)} share their "
                "memory, must be one parameter (b.weight = a.weight) or two"
            )


def _expert(name: str) -> tuple[str, str] | None:
    match = EXPERT.fullmatch(name)
    return None if match is None else (match["layer"], match["expert"])


def _first_names(network: OwnNetwork) -> dict[str, str]:
    """Return the further names of parameters that have several names, each with the first one."""
    first: dict[int, str] = {}
    further = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            further[name] = first[id(parameter)]
    return further


def _once(network: OwnNetwork, state: dict[str, Any], prefix: str, *_: object) -> None:
    for name in network._first_name:
        state.pop(prefix + name, None)
