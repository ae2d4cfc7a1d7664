"""The node's own randomness: independent streams from one 256-bit secret.

Sampling and noise come from ChaCha20 keystreams. A stream is named by its purpose and step, so no draw ever
depends on how many draws were made before, and a secret that was stored can replay its mechanism exactly.
"""

from __future__ import annotations

import hashlib
import math
import secrets

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from torch import Tensor

SECRET_BYTES = 32


def fresh_secret() -> bytes:
    """Return 256 bits of operating-system entropy."""
    return secrets.token_bytes(SECRET_BYTES)


def derive(secret: bytes, *labels: str | int) -> bytes:
    """Derive a 256-bit secret for a purpose (keyed BLAKE2b over the length-prefixed labels)."""
    mac = hashlib.blake2b(key=secret, digest_size=SECRET_BYTES)
    for label in labels:
        encoded = str(label).encode()
        mac.update(len(encoded).to_bytes(8, "big") + encoded)
    return mac.digest()


def uniform_words(secret: bytes, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Return ``count`` uniform 64-bit words of the stream; word i is a function of (secret, i) alone."""
    keystream = Cipher(ChaCha20(secret, bytes(16)), mode=None).encryptor().update(bytes(8 * count))
    return np.frombuffer(keystream, dtype="<u8").astype(np.uint64, copy=False)


def standard_normal(secret: bytes, count: int) -> Tensor:
    """Return ``count`` standard normal values as float64 on the CPU (Box–Muller on 53-bit uniforms).

    The tail is cut where the uniforms end: no value exceeds √(2·53·ln 2) ≈ 8.57, which a true normal does
    with probability 1e-17.
    """
    pairs = (count + 1) // 2
    words = uniform_words(secret, 2 * pairs)
    unit = ((words >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53  # in (0, 1]: log is finite
    radius = np.sqrt(-2.0 * np.log(unit[:pairs]))
    angle = (2.0 * math.pi) * unit[pairs:]
    values = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
    return torch.from_numpy(values)
