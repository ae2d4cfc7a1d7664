"""Which units take part in training and which are held out for evaluation: by a keyed hash of each unit alone."""

from __future__ import annotations

import hashlib
import hmac

import torch
from torch import Tensor

from data.sources import GROUP, Records


def split(records: Records, *, unit: str, key: bytes, share: float) -> tuple[Records, Records]:
    """Return the records of units that train, and those of units that are held out; one of them may be empty.

    A unit's side is HMAC-SHA256(key, its identity), compared with ``share``. So it depends on no other unit: who joins
    or leaves moves nobody, and with the same key and share no unit is ever on both sides.

    Args:
        unit: ``record``: what identifies one is its content, so equal records are on one side wherever they stand.
            ``group``: its number in ``group``, which must be the group's for good.
        key: secret to whoever chooses records, or they could choose their side.
        share: of units to hold out, in [0, 1); 0 holds nothing out.
    """
    held_out = _in_group(records, key, share) if unit == "group" else _by_content(records, key, share)
    return (
        {name: tensor[~held_out] for name, tensor in records.items()},
        {name: tensor[held_out] for name, tensor in records.items()},
    )


def _in_group(records: Records, key: bytes, share: float) -> Tensor:
    numbers, member = records[GROUP].unique(return_inverse=True)
    chosen = [_is_held_out(key, str(number).encode(), share) for number in numbers.tolist()]
    return torch.tensor(chosen, dtype=torch.bool)[member]


def _by_content(records: Records, key: bytes, share: float) -> Tensor:
    fields = [name for name in sorted(records) if name != GROUP]
    arrays = [records[name].numpy() for name in fields]
    chosen = [
        _is_held_out(key, b"".join(value.tobytes() for value in record), share) for record in zip(*arrays, strict=True)
    ]
    return torch.tensor(chosen, dtype=torch.bool)


def _is_held_out(key: bytes, identity: bytes, share: float) -> bool:
    word = int.from_bytes(hmac.new(key, identity, hashlib.sha256).digest()[:8], "big")
    return word < int(share * 2.0**64)
