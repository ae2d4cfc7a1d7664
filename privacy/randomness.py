"""The node's own randomness: independent streams from one 256-bit secret.

Sampling, noise and per-unit draws come from ChaCha20 keystreams. A stream is named by its purpose and step, so no
draw ever depends on how many draws were made before, and a secret that was stored can replay its mechanism exactly.
"""

from __future__ import annotations

import hashlib
import math
import secrets

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray
from torch import Tensor

SECRET_BYTES = 32

PAIRS = 2048
"""Pairs of normal values in a block: a call costs a whole one at least, 0.1 ms. Changing it changes the values of a
secret."""
BLOCK = 2 * PAIRS
TOGETHER = 15
"""Blocks in one array operation, where there are as many. Longer operations let other threads run beside them: each
one asks for Python's lock. From 16 on torch would give a part of its own to each of its threads."""


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
    """Return ``count`` standard normal values as float64 on the CPU; value i is a function of (secret, i) alone.

    Box–Muller (1958) on pairs of 64-bit words, one float64 method for every consumer: noise is added to float64 sums,
    and a float32 normal would put it on a coarser grid.

    Guarantee: the radius R and the angle of a pair have distribution functions within 2^-50 of the exact ones. Small
    uniforms keep full relative precision, so the tail P(R > r) = p is right to a factor 1 ± (2^-64/p + 2^-45). It is
    cut at √(128·ln 2) ≈ 9.42, which an exact pair's radius exceeds with probability 2^-64: for n values the cut costs
    at most n·2^-65 in total variation (3e-13 for 10^7), which a mechanism pays 1 + e^ε times in δ. Values lie on the
    grid of float64 arithmetic and their low bits are not protected against an adversary who reads them
    (Mironov 2012, doi:10.1145/2382196.2382264): the claim is for the numeric level ``fast``.

    The values are the same on every run and with any number of threads; another machine's log or sine may differ.
    """
    values = np.empty(-(-count // BLOCK) * BLOCK)
    fill_normal(secret, values)
    return torch.from_numpy(values[:count])


def fill_normal(secret: bytes, values_N: NDArray[np.float64], first_block: int = 0) -> None:
    """Fill whole blocks with the values of :func:`standard_normal` from number ``first_block · BLOCK`` on.

    Args:
        values_N: contiguous, a multiple of :data:`BLOCK` long.
    """
    # Blocks are always computed whole, so a vector loop's remainder never decides how a value is rounded.
    blocks = values_N.reshape(-1, 2, PAIRS)
    most = max(1, min(TOGETHER, len(blocks)))
    zeros = bytes(8 * BLOCK * most)
    keystream = bytearray(len(zeros))
    words = np.frombuffer(keystream, dtype="<i8").reshape(most, 2, PAIRS)
    # 64 bits each of block counter and nonce; ChaCha20's own blocks are 64 bytes.
    counter = (first_block * 8 * BLOCK // 64).to_bytes(8, "little")
    encryptor = Cipher(ChaCha20(secret, counter + bytes(8)), mode=None).encryptor()
    scratch = torch.empty(3, most, PAIRS, dtype=torch.float64, device="cpu")
    for start in range(0, len(blocks), most):
        some = blocks[start : start + most]
        encryptor.update_into(zeros[: 8 * BLOCK * len(some)], keystream)
        _box_muller(words[: len(some)].swapaxes(0, 1), some.swapaxes(0, 1), scratch[:, : len(some)])


def _box_muller(words: NDArray[np.int64], out: NDArray[np.float64], scratch: Tensor) -> None:
    """Turn uniform signed words [2, …] into independent standard normals [2, …], by way of scratch [3, …].

    The first word w gives the radius √(−2 ln u), u = (|w| + ½)/2^63, in [2^-64, 1]; P(u' ≤ u) = u on that lattice.
    Its sign turns the pair by half a turn, so the second word need only give an angle 2φ in ±π/2. With s = sin φ and
    the diameter 2R, R cos 2φ = (½ − s²)·2R and R sin 2φ = s√(1 − s²)·2R, free of cancellation for |φ| ≤ π/4: one sine,
    no cosine.
    """
    # torch's log takes two thirds of the time of numpy's, its sine a third; all else is faster in numpy. Where they
    # come from Intel's library, a last bit may depend on where an array begins: torch's begin at multiples of 64 bytes.
    _, angle_tensor, diameter_tensor = scratch
    signed, s, diameter = scratch.numpy()
    cosine, sine = out
    np.copyto(scratch.numpy()[:2], words)  # int64 → float64, to nearest
    np.abs(signed, out=diameter)
    diameter += 0.5
    diameter *= 2.0**-63
    torch.log(diameter_tensor, out=diameter_tensor)
    diameter *= -8.0
    np.sqrt(diameter, out=diameter)
    np.copysign(diameter, signed, out=diameter)
    s *= math.pi / 4 * 2.0**-63
    torch.sin(angle_tensor, out=angle_tensor)
    np.multiply(s, s, out=cosine)
    np.subtract(1.0, cosine, out=sine)
    np.sqrt(sine, out=sine)
    sine *= s
    sine *= diameter
    np.subtract(0.5, cosine, out=cosine)
    cosine *= diameter


def per_unit_uniform(secret: bytes, step: int, unit_B: Tensor, count: int) -> Tensor:
    """Return ``count`` uniforms in (0, 1) for each unit, float64 [B, count] on the CPU, for dropout and the like.

    Row b is a function of (secret, step, unit_B[b]) alone: adding, removing or reordering other units changes no bit
    of it, and its first values do not depend on ``count``. One stream for all units would be shifted from an inserted
    unit on, and then a unit moves more than its own contribution to the sum.

    Args:
        secret: 256 bits; ``derive`` one for each purpose (dropout, Gumbel noise, masking, each layer).
        step: the step; streams of different steps are independent.
        unit_B: int64 ids, any value. They must never change: a position in the batch would be a shared stream.
            The same id twice gives the same row twice.
        count: draws for each unit, at most 2^31.

    Guarantee: values are (k + ½)·2^-52, k uniform on 52 bits of a ChaCha20 keystream, keyed by (secret, step), with
    the unit as nonce. Neither 0 nor 1 occurs, so log(u) and −log(−log(u)) are finite.
    """
    zeros = bytes(8 * count)
    buffer = bytearray(len(unit_B) * len(zeros))
    keystream = memoryview(buffer)
    encryptor = Cipher(ChaCha20(derive(secret, "unit", step), bytes(16)), mode=None).encryptor()
    for row, unit in enumerate(unit_B.tolist()):
        # 64 bits each of block counter and nonce; making a context for each unit would take most of the time.
        encryptor.reset_nonce(bytes(8) + unit.to_bytes(8, "little", signed=True))
        encryptor.update_into(zeros, keystream[row * len(zeros) : (row + 1) * len(zeros)])
    words = np.frombuffer(buffer, dtype="<u8").reshape(len(unit_B), count)
    return torch.from_numpy(((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52)
