"""Which units take part in training and which are held out for evaluation: by a keyed hash of each unit alone."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Iterator

import torch

from conclave.data.sources import GROUP
from conclave.model.records import Records
from conclave.privacy.ledger import Genesis


def split(records: Records, identities: Iterable[bytes], *, key: bytes, share: float) -> tuple[Records, Records]:
    """Return the records of units that train, and those of units that are held out; one of them may be empty.

    A unit's side is HMAC-SHA256(key, its identity), compared with ``share``. So it depends on no other unit: who joins
    or leaves moves nobody, and with the same key and share no unit is ever on both sides.

    Args:
        identities: what the unit of each record is known by. It must never change. Units with the same identity,
            such as equal records, are on the same side.
        key: must be secret from whoever chooses records, or they could choose their side.
        share: of units to hold out, in [0, 1); 0 holds nothing out.
    """
    held_out = torch.tensor([_is_held_out(key, identity, share) for identity in identities], dtype=torch.bool)
    return (
        {name: tensor[~held_out] for name, tensor in records.items()},
        {name: tensor[held_out] for name, tensor in records.items()},
    )


def sides_of(records: Records, genesis: Genesis, identities: Iterable[bytes] | None) -> tuple[Records, Records]:
    """Divide a node's records as its training ledger fixes it: those that train, and those that are held out.

    Args:
        identities: what each record is known by, ignored if groups are the unit; None if records are known
            by their content, as in a simulation.
    """
    if genesis.unit == "group":
        identities = by_group(records)
    elif identities is None:
        identities = by_content(records)
    return split(records, identities, key=bytes.fromhex(genesis.split_key), share=float(genesis.held_out))


def by_group(records: Records) -> Iterator[bytes]:
    """Yield the identity of each record's group: its number, which must never change."""
    return (str(number).encode() for number in records[GROUP].tolist())


def by_content(records: Records) -> Iterator[bytes]:
    """Yield each record's content as its identity, as simulations do.

    Not for a node's records: another version could read the same file differently. For those, see
    :mod:`conclave.data.values.identity`.
    """
    fields = [name for name in sorted(records) if name != GROUP]
    arrays = [records[name].numpy() for name in fields]
    return (b"".join(value.tobytes() for value in record) for record in zip(*arrays, strict=True))


def _is_held_out(key: bytes, identity: bytes, share: float) -> bool:
    word = int.from_bytes(hmac.digest(key, identity, hashlib.sha256)[:8], "big")
    return word < int(share * 2.0**64)
