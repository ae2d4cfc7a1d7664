"""Fewer bytes for tensors on the wire: bfloat16, or int8 with a scale for each row.

Encoding a delta is post-processing of the released, noised value: it costs no privacy. It is rounded at random, so its
mean is the delta and nodes' errors average out, by a secret of the node's own, so a charge that runs again after a
crash gives the same bytes. Names, shapes and types on the wire follow from public shapes alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Size, Tensor

from conclave.base.frozen import Frozen
from conclave.privacy.randomness import uniform_words

Encoding = Literal["fp32", "bf16", "int8"]

_PACKED = "packed/"  # no parameter's name begins so: see model/parameters.py
_SCALES = f"{_PACKED}int8-scales"
_DTYPES: dict[Encoding, torch.dtype] = {"bf16": torch.bfloat16, "int8": torch.int8}
_SMALLEST, _INFINITE, _NAN = 0x0080, 0x7F80, 0x7FC0  # bfloat16 as bits: the smallest normal number, 2^-126; inf; NaN


class TrafficConfig(Frozen):
    """How tensors travel. What the nodes' noise and the server's sums are made of stays float32.

    model: to the nodes; rounded to nearest, and a node's delta is relative to what it received. delta: back.
    """

    model: Literal["fp32", "bf16"] = "fp32"
    delta: Encoding = "fp32"


def encodings_of(encoding: Encoding, names: Mapping[str, Size]) -> dict[str, Encoding]:
    """Return name → encoding for these tensors; what is not in such a map travels as float32."""
    return {} if encoding == "fp32" else dict.fromkeys(names, encoding)


def norm_growth(expected: Mapping[str, Size], encodings: Mapping[str, Encoding]) -> float:
    """Return how many times as long, in L2, tensors may be after rounding. It holds for every draw, not on average.

    bfloat16 moves a value by less than 2^-7 of itself. int8 moves each of a row's n values by less than its scale,
    at most ‖row‖/126: the row by less than √n/126 times its norm. (Rows whose values are all below 2^-119 aside.)
    """
    growth = 1.0 + 2.0**-7 if "bf16" in encodings.values() else 1.0
    longest = max((_rows(expected[name])[1] for name, encoding in encodings.items() if encoding == "int8"), default=0)
    return max(growth, 1.0 + math.sqrt(longest) / 126)


def error_bounds(tensor: Tensor, encoding: Encoding) -> Tensor:
    """Return by how much each value that arrived may differ from what it was before rounding; the tensor's shape.

    bfloat16: less than 2^-7 of the value. int8: less than its row's scale; the row's largest is at least 126 scales.
    """
    if encoding == "fp32":
        return torch.zeros_like(tensor)
    if encoding == "bf16":
        return tensor.abs() * 2.0**-7
    rows, _ = _rows(tensor.shape)
    flat = tensor.abs().reshape(rows, -1)
    return (flat.amax(1, keepdim=True) / 126.0).expand_as(flat).reshape(tensor.shape)


@dataclass(frozen=True)
class _Pack:
    """Tensors that travel side by side in one, flat: their names and shapes, and for int8 their rows."""

    shapes: dict[str, Size]
    starts: NDArray[np.intp]
    lengths: NDArray[np.intp]

    @classmethod
    def of(cls, shapes: dict[str, Size]) -> _Pack:
        counts, lengths = np.array([_rows(shape) for shape in shapes.values()], dtype=np.intp).T
        rows = np.repeat(lengths, counts)
        return cls(shapes, np.cumsum(rows) - rows, rows)

    @property
    def size(self) -> int:
        return sum(shape.numel() for shape in self.shapes.values())

    def flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        for name, shape in self.shapes.items():  # side by side, nobody can check them any more
            if name not in tensors or tensors[name].shape != shape or tensors[name].dtype != torch.float32:
                raise ValueError("a tensor does not have the name, shape and type that were expected")
        return torch.cat([tensors[name].detach().cpu().reshape(-1) for name in self.shapes])

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


class WireForm:
    """What tensors look like on the wire.

    Tensors of one encoding travel as one flat tensor, in the order of their names, and are rounded in one pass. With
    a header for each and for its scales, and scales in float32, an int8 delta of digits would be 14 % longer.

    shapes, dtypes: of what travels, by name; whoever checks a message checks for exactly these.
    """

    def __init__(self, expected: Mapping[str, Size], encodings: Mapping[str, Encoding]) -> None:
        """Lay out tensors of ``expected`` shapes; those without an encoding travel by their own names, float32.

        Raises:
            ValueError: a name is not expected, or is one that packed tensors travel by.
        """
        if not encodings.keys() <= expected.keys() or any(name.startswith(_PACKED) for name in expected):
            raise ValueError("an encoding of a tensor that does not travel, or a tensor with a packed one's name")
        self._packs: dict[Encoding, _Pack] = {}
        for encoding in _DTYPES:
            shapes = {name: expected[name] for name in sorted(encodings) if encodings[name] == encoding}
            if shapes:
                self._packs[encoding] = _Pack.of(shapes)
        packed = {name for pack in self._packs.values() for name in pack.shapes}
        self.shapes = {name: shape for name, shape in expected.items() if name not in packed}
        self.dtypes = dict.fromkeys(self.shapes, torch.float32)
        for encoding, pack in self._packs.items():
            self.shapes[_PACKED + encoding], self.dtypes[_PACKED + encoding] = Size([pack.size]), _DTYPES[encoding]
        if "int8" in self._packs:
            self.shapes[_SCALES], self.dtypes[_SCALES] = Size(self._packs["int8"].lengths.shape), torch.bfloat16

    def encode(self, tensors: Mapping[str, Tensor], secret: bytes | None) -> dict[str, Tensor]:
        """Return what travels for float32 ``tensors`` of the expected names and shapes; other names stay as they are.

        Args:
            secret: 256 bits for the rounding alone. None rounds to nearest, for bfloat16 only.

        Guarantee: the mean over secrets of what :meth:`decode` gives is the value (below 2^127), for bfloat16 exactly,
        for int8 within 2^-32 of a scale; zeros stay zeros. A value that is not finite is sent as NaN, with int8 as
        its row's scale: the receiver refuses either, as it would refuse the value itself.

        Raises:
            ValueError: a tensor is missing, of another shape or not float32; int8 without a secret.
        """
        packed = {name for pack in self._packs.values() for name in pack.shapes}
        sent = {name: tensor for name, tensor in tensors.items() if name not in packed}
        for encoding, pack in self._packs.items():
            flat = pack.flat(tensors)
            if encoding == "int8":
                if secret is None:
                    raise ValueError("int8 is rounded at random")
                sent[_PACKED + encoding], sent[_SCALES] = _to_int8(flat.numpy(), pack, secret)
            else:
                sent[_PACKED + encoding] = flat.bfloat16() if secret is None else _to_bf16(flat.numpy(), secret)
        return sent

    def decode(self, sent: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the float32 tensors for what travelled, of exactly the form's names, shapes and types.

        Raises:
            ValueError: int8 of -128, or a scale that is negative, not finite or below 2^-126: never sent by
                :meth:`encode` for finite tensors.
        """
        tensors = {name: tensor for name, tensor in sent.items() if not name.startswith(_PACKED)}
        for encoding, pack in self._packs.items():
            flat = sent[_PACKED + encoding]
            if encoding == "int8":
                tensors |= pack.views(_from_int8(flat, sent[_SCALES], pack))
            else:
                tensors |= pack.views(flat.float())
        return tensors


def wire_form(expected: Mapping[str, Size], encodings: Mapping[str, Encoding]) -> WireForm:
    """Return the :class:`WireForm` of tensors, made once for each set of names, shapes and encodings."""
    return _wire_form(tuple(expected.items()), tuple(encodings.items()))


@lru_cache(maxsize=128)  # a form holds 16 bytes for each row
def _wire_form(expected: tuple[tuple[str, Size], ...], encodings: tuple[tuple[str, Encoding], ...]) -> WireForm:
    return WireForm(dict(expected), dict(encodings))


def _rows(shape: Size) -> tuple[int, int]:
    """Rows of a tensor, and values in each: along all axes but the first; a vector or a scalar is one row."""
    if shape.numel() == 0:
        return 0, 0
    return (1, shape.numel()) if len(shape) < 2 else (shape[0], shape.numel() // shape[0])


def _to_bf16(flat: NDArray[np.float32], secret: bytes) -> Tensor:
    """Round to a neighbouring bfloat16 at random: with 16 uniform bits added, what is cut off carries with its share.

    Within a binade the neighbours are 2^16 steps of float32 apart, so the mean is exact.
    """
    draws = uniform_words(secret, -(-len(flat) // 4)).view(np.uint16)[: len(flat)]
    bits = flat.view(np.uint32) + draws
    bits >>= 16
    bits[~np.isfinite(flat)] = _NAN  # a carry could make NaN a number
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(torch.bfloat16)


def _to_int8(flat: NDArray[np.float32], pack: _Pack, secret: bytes) -> tuple[Tensor, Tensor]:
    """Return the values in steps of their row's scale, each rounded to a neighbour at random, and the scales."""
    draws = uniform_words(secret, -(-len(flat) // 2)).view(np.uint32)[: len(flat)]
    if len(flat) == 0:
        return torch.empty(0, dtype=torch.int8), torch.empty(0, dtype=torch.bfloat16)
    bits = _scale_bits(np.maximum.reduceat(np.abs(flat), pack.starts))
    scale = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    usable = (bits > 0) & (bits < _INFINITE)
    inverse = np.divide(1.0, scale, where=usable, out=np.zeros_like(scale))
    steps = np.where(np.isfinite(flat), flat, 0.0) if not usable.all() else flat
    scaled = np.repeat(inverse, pack.lengths)
    scaled *= steps
    return _round_randomly(scaled, draws), torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def _scale_bits(most: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the scales, bfloat16 as bits, for rows whose largest values are ``most``.

    A scale is the first bfloat16 above most/127, at most 2^-7 more: with its 8 bits and a value's 7, their product is
    a float32, so decoding rounds nothing. It is at least 2^-126, so no arithmetic meets subnormal numbers.
    """
    bits: NDArray[np.uint16] = ((most / np.float32(127.0)).view(np.uint32) >> 16).astype(np.uint16)
    bits += 1
    np.maximum(bits, _SMALLEST, out=bits)
    bits[most == 0.0] = 0
    bits[~np.isfinite(most)] = _NAN
    return bits


def _round_randomly(steps: NDArray[np.float64], draws: NDArray[np.uint32]) -> Tensor:
    """Round each of ``steps``, in ±127, up with the probability of its fraction, by a uniform word each; int8.

    u = (word + ½)/2^32 is never 0 or 1: a whole number stays, and nothing leaves ±127.
    """
    uniform = draws + 0.5
    uniform *= 2.0**-32
    uniform += steps
    return torch.from_numpy(np.floor(uniform, out=uniform).astype(np.int8))


def _from_int8(values: Tensor, scales: Tensor, pack: _Pack) -> Tensor:
    bits = scales.view(torch.int16)
    if bool(((bits != 0) & ((bits < _SMALLEST) | (bits >= _INFINITE))).any()):
        raise ValueError("a scale is negative, not finite or too small")
    if len(values) and int(values.min()) == -128:
        raise ValueError("a value of -128")
    return values.float().mul_(torch.from_numpy(np.repeat(scales.float().numpy(), pack.lengths)))
