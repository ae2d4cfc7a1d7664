"""Whether work that a crash interrupted can be done again with the very same result.

A charge pays for one output. After a crash the work may run again only where the output would be the same, bit for
bit: with the same secret, code, numeric environment and start state.
"""

from __future__ import annotations

import platform

import torch

from conclave.base.canonical import canonical_json, sha256
from conclave.privacy.code_identity import code_hash


def repeat_key(device: torch.device, start_state: bytes | None) -> str:
    """Return a hash of what an output follows from, beside the request and the secret.

    Args:
        device: where the work runs.
        start_state: what an earlier charge left on the node, if anything.
    """
    environment = [
        code_hash(),
        torch.__version__,
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        torch.get_num_threads(),
        torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "" if start_state is None else sha256(start_state),
    ]
    return sha256(canonical_json(environment))
