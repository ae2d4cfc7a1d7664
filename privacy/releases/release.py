"""The one door: everything derived from private data leaves a node through :func:`release`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors.torch import save
from torch import Size, Tensor

from conclave.privacy.ledger import Ledger, Reservation, StoredReply


def release(
    ledger: Ledger,
    reservation: Reservation,
    output: Mapping[str, Tensor],
    expected: Mapping[str, Size],
    local_state: Mapping[str, bytes] | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> StoredReply:
    """Commit an output against its charge and return the bytes that may be sent.

    Args:
        reservation: the charge that pays; it was written before the output existed.
        output: what the charged mechanism produced.
        expected: name → shape of exactly what was charged. It is an allow-list and a must-list: a missing
            tensor would tell what the data touched, an extra one was not paid for.
        local_state: what the same work leaves on the node, committed together with the output. It never leaves.
        dtypes: name → type if it is not float32, for an output that was rounded after its noise was added.

    Returns:
        The stored bytes (safetensors) and the receipt for them. After a race these are the winner's, not this
        output's.

    Raises:
        ValueError: the output is not exactly what was charged, or no reservation pays for it.
    """
    if output.keys() != expected.keys():
        raise ValueError("the output does not have exactly the names that were charged")
    for name, tensor in output.items():
        if tensor.shape != expected[name] or tensor.dtype != (dtypes or {}).get(name, torch.float32):
            raise ValueError("an output tensor does not have the shape and type that were charged")
    ordered = {name: output[name].detach().cpu().contiguous() for name in sorted(output)}
    return ledger.commit(reservation, save(ordered), local_state)
