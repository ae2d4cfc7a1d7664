"""Which parameter belongs to what: shared weights, router rows or one routed expert.

On the wire every name is global, whatever an expert's local position:

* ``shared/<parameter>``
* ``router/<layer>/<expert>/<parameter>``: the router's row for one expert
* ``expert/<layer>/<expert>/<parameter>``: one expert's matrix

Of a router, what lies in its module ``common`` (queries, group scores) belongs to no single expert and is shared.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from conclave.model.building import empty
from conclave.model.config import ModelConfig
from conclave.model.experts.config import HeldExperts
from conclave.model.own import EXPERT

_STACKED = re.compile(r"blocks\.(?P<layer>\d+)\.moe\.(?P<part>experts|router)\.(?!common\.)(?P<name>.+)")
_NUMBER = re.compile(r"0|[1-9][0-9]*")  # one spelling only: no leading zeros, no other scripts
_PART_TO_GROUP = {"experts": "expert", "router": "router"}
_GROUP_TO_PART = {group: part for part, group in _PART_TO_GROUP.items()}


class Owner(NamedTuple):
    """Whose parameter a wire name is: ``group`` is shared, router or expert; the rest is None for shared."""

    group: str
    layer: int | None
    expert: int | None


def owner(wire_name: str) -> Owner:
    """Parse a wire name.

    Raises:
        ValueError: the name follows none of the three forms.
    """
    group, _, rest = wire_name.partition("/")
    if group == "shared" and rest:
        return Owner("shared", None, None)
    parts = rest.split("/")
    if group in _GROUP_TO_PART and len(parts) == 3 and all(map(_NUMBER.fullmatch, parts[:2])) and parts[2]:
        return Owner(group, int(parts[0]), int(parts[1]))
    raise ValueError("not a parameter name")


def split(state: Mapping[str, Tensor], held: HeldExperts) -> dict[str, Tensor]:
    """Turn a module's state dict into wire names; expert and router tensors become views, one per expert."""
    wire: dict[str, Tensor] = {}
    for name, tensor in state.items():
        own = EXPERT.fullmatch(name)
        if own is not None:
            wire[f"expert/{int(own['layer'])}/{int(own['expert'])}/{name}"] = tensor
            continue
        match = _STACKED.fullmatch(name)
        if match is None:
            wire[f"shared/{name}"] = tensor
            continue
        layer = int(match["layer"])
        for position, expert in enumerate(held[layer]):
            wire[f"{_PART_TO_GROUP[match['part']]}/{layer}/{expert}/{match['name']}"] = tensor[position]
    return wire


def join(wire: Mapping[str, Tensor], held: HeldExperts) -> dict[str, Tensor]:
    """Inverse of :func:`split`: stack the experts in ``held`` in their order; others are left out.

    Raises:
        KeyError: a tensor of a held expert is missing.
    """
    state: dict[str, Tensor] = {}
    stacked: dict[tuple[str, int, str], None] = {}
    for wire_name, tensor in wire.items():
        group, layer, expert = owner(wire_name)
        name = wire_name.rpartition("/")[2]
        if EXPERT.fullmatch(name):
            if expert in held.get(layer or 0, ()):
                state[name] = tensor
        elif layer is None:
            state[wire_name.partition("/")[2]] = tensor
        else:
            stacked[group, layer, wire_name.rpartition("/")[2]] = None
    for group, layer, name in stacked:
        rows = [wire[f"{group}/{layer}/{expert}/{name}"] for expert in held[layer]]
        state[f"blocks.{layer}.moe.{_GROUP_TO_PART[group]}.{name}"] = torch.stack(rows)
    return state


def select(wire_names: Iterable[str], held: HeldExperts) -> list[str]:
    """The names that travel to a holder of ``held``: all shared ones, and the rows and experts it holds."""
    return [name for name in wire_names if _travels(owner(name), held)]


def _travels(who: Owner, held: HeldExperts) -> bool:
    return who.layer is None or who.expert in held.get(who.layer, ())


def shapes(config: ModelConfig, held: HeldExperts) -> dict[str, torch.Size]:
    """Wire name → shape of every tensor that a holder of ``held`` must receive and return."""
    return dict(_shapes(config, tuple(sorted(held.items()))))


@lru_cache(maxsize=1024)
def _shapes(config: ModelConfig, held: tuple[tuple[int, tuple[int, ...]], ...]) -> dict[str, torch.Size]:
    state = empty(config, dict(held)).state_dict()
    return {name: tensor.shape for name, tensor in split(state, dict(held)).items()}
