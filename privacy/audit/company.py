"""Batches that put the same records into different company: more or fewer records, others, in another place.

Made from the records that were brought: repeated, resampled, and, where the model takes them, changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from conclave.model.records import Records

_SIZES = (2, 3, 17, 33, 65, 100, 127, 256)
"""Even and odd, around powers of two, up to what training takes at once where memory allows."""
_FEW = 40
_MADE_UP = 16


@dataclass(frozen=True)
class Company:
    """A batch of which some rows are records that were brought.

    example_B: int64, the number of each row: of the record that it is, or a further number where it is made up.
    known_B: bool, which rows are such records.
    made_up: whether any row is made up, so that a model may refuse it.
    gradients: of which known rows to take gradients too. Losses are cheaper to compare; for rows that are NaN nothing
        else can be compared, and of many rows the last is as good as any.
    """

    name: str
    batch: Records
    example_B: Tensor
    known_B: Tensor
    made_up: bool = False
    gradients: Literal["none", "last", "ends"] = "ends"


def companies(records: Records, most: int) -> Iterator[Company]:
    """Yield batches of 2 to ``most`` rows.

    Args:
        records: at least 2.
        most: how many rows training processes at once.
    """
    n = len(next(iter(records.values())))
    draw = torch.Generator().manual_seed(0)
    yield _brought(records, "all others", torch.arange(n))
    yield _brought(records, "all others, reversed", torch.arange(n).flip(0))
    yield _brought(records, "all others but one", torch.arange(1, n))
    for unit in (0, n - 1):
        yield _brought(records, "copies of itself", torch.full((n,), unit))
    for size in sorted({size for size in _SIZES if size < most} | {most - 1, most} - {0, 1}):
        company = _brought(records, f"{size - 1} others", torch.randint(n, (size,), generator=draw))
        if size > _FEW:
            company = replace(company, gradients="last" if size in (_SIZES[-3], most) else "none")
        yield company
    for name, change in _CHANGES.items():
        with suppress(RuntimeError, TypeError):  # whole numbers of a type that few operations know
            yield _with_made_up(records, name, change, draw)


def _brought(records: Records, name: str, example_B: Tensor) -> Company:
    batch = {key: tensor[example_B.to(tensor.device)] for key, tensor in records.items()}
    return Company(name, batch, example_B, torch.ones(len(example_B), dtype=torch.bool))


Change = Callable[[Tensor, torch.Generator], Tensor]


def _with_made_up(records: Records, name: str, change: Change, draw: torch.Generator) -> Company:
    """Put made-up rows between the records, first and last too."""
    n = len(next(iter(records.values())))
    known_B = torch.zeros(n + _MADE_UP, dtype=torch.bool)
    known_B[torch.linspace(1, n + _MADE_UP - 2, n).long()] = True
    example_B = torch.arange(n, 2 * n + _MADE_UP)
    example_B[known_B] = torch.arange(n)
    batch = {}
    for key, tensor in records.items():
        source = torch.randint(n, (n + _MADE_UP,), generator=draw).to(tensor.device)
        rows = change(tensor[source], draw)
        rows[known_B.to(tensor.device)] = tensor
        batch[key] = rows
    gradients: Literal["none", "ends"] = "none" if change is _not_numbers else "ends"
    return Company(name, batch, example_B, known_B, made_up=True, gradients=gradients)


def _mixed(x: Tensor, draw: torch.Generator) -> Tensor:
    """Every feature from another record, also labels."""
    flat = x.reshape(len(x), -1)
    order = torch.argsort(torch.rand(flat.shape, generator=draw), dim=0).to(x.device)
    return flat.gather(0, order).view(x.shape)


def _large(x: Tensor, draw: torch.Generator) -> Tensor:
    return x * -30.0 if x.is_floating_point() else _in_range(x, draw)


def _empty(x: Tensor, draw: torch.Generator) -> Tensor:
    return torch.zeros_like(x) if x.is_floating_point() else x.amin().expand_as(x).clone()


def _not_numbers(x: Tensor, draw: torch.Generator) -> Tensor:
    return torch.full_like(x, math.nan) if x.is_floating_point() else x


def _in_range(x: Tensor, draw: torch.Generator) -> Tensor:
    """Any whole number between the smallest and the largest that was brought."""
    if x.dtype == torch.bool:
        return torch.randint(2, x.shape, generator=draw).to(x.device, torch.bool)
    low, high = int(x.amin()), int(x.amax())
    return torch.randint(low, high + 1, x.shape, generator=draw).to(x.device, x.dtype)


_CHANGES: dict[str, Change] = {
    "others mixed from several records": _mixed,
    "others 30 times as large": _large,
    "others of the smallest values": _empty,
    "others that are not numbers": _not_numbers,
}
