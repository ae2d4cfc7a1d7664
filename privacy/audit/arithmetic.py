"""Arithmetic in which a row's result does not depend on the rows around it, so a coupling is not mistaken for rounding.

A kernel adds up in an order that depends on the shape of the batch, and the last bits of a row with it: at float32 by
1e-7, at bfloat16 by a per cent. A tolerance wide enough for that hides small couplings. Instead every operation is
computed in float64 and rounded once to the type it would have had: whatever the order, the rounded result is the same,
save for sums that fall on the very edge between two values (one in 10^8 at float32, fewer below).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_WIDE = {
    torch.bfloat16: torch.float64,
    torch.float16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
_EXACT = 1e-6
"""What is left where every operation was rounded once: an edge case moves one value by one unit in its last place."""
_PLAIN = 1e-3
_UNITS_IN_THE_LAST_PLACE = 8


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the relative error within which two plain computations of one gradient agree at that precision."""
    return max(_PLAIN, _UNITS_IN_THE_LAST_PLACE * torch.finfo(dtype).eps)


class RoundedOnce(TorchDispatchMode):
    """Within it, operations on floating-point tensors are computed in float64 and rounded once.

    coarsest: the least precise floating-point type that an operation returned; None before the first.
    as_they_are: operations without a float64 form, and the least precise type that they returned.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.coarsest: torch.dtype | None = None
        self.as_they_are: dict[str, torch.dtype] = {}

    @property
    def tolerance(self) -> float:
        """The relative error that rounding can explain, after what was run so far."""
        return max([_EXACT, *(tolerance_of(dtype) for dtype in self.as_they_are.values())])

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation, and again in float64; keep the first one's types and the second one's values."""
        kwargs = dict(kwargs or {})
        if not _computes(func) or not any(x.dtype in _WIDE for x in _tensors((args, *kwargs.values()))):
            return self._seen(func(*args, **kwargs))
        wide_args, wide_kwargs = _widened(args), {name: _widened(x) for name, x in kwargs.items()}
        result = self._seen(func(*args, **kwargs))  # only now: an operation in place changes its arguments
        try:
            wide = _grouped_products(*wide_args, **wide_kwargs) if func in _GROUPED else func(*wide_args, **wide_kwargs)
            for out, exact in zip(_tensors(result), _tensors(wide), strict=True):
                if out.dtype in _WIDE:
                    out.copy_(exact)
        except (RuntimeError, NotImplementedError, ValueError, TypeError):
            for out in _tensors(result):
                if out.dtype in _WIDE and out.dtype.is_floating_point:
                    before = self.as_they_are.get(str(func), out.dtype)
                    self.as_they_are[str(func)] = max(before, out.dtype, key=_eps)
        return result

    def _seen(self, result: Any) -> Any:
        for out in _tensors(result):
            if out.dtype.is_floating_point:
                self.coarsest = out.dtype if self.coarsest is None else max(self.coarsest, out.dtype, key=_eps)
        return result


@cache
def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _tensors(x: Any) -> Iterator[Tensor]:
    """Arguments and results of operations are tensors, or plain sequences of them."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, list | tuple):
        for inner in x:
            yield from _tensors(inner)


def _widened(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.to(_WIDE[x.dtype]) if x.dtype in _WIDE else x
    if isinstance(x, list | tuple):
        return type(x)(map(_widened, x))
    return _WIDE.get(x, x) if isinstance(x, torch.dtype) else x


@cache
def _computes(func: Any) -> bool:
    """Views and conversions compute nothing, and random operations must not run twice."""
    if torch.Tag.nondeterministic_seeded in func.tags or func._schema.name in _MOVE_ONLY:
        return False
    return not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


_MOVE_ONLY = {
    f"aten::{name}"
    for name in ("_to_copy", "clone", "copy_", "empty_like", "new_empty", "new_empty_strided", "_local_scalar_dense")
}
_GROUPED = {torch.ops.aten._grouped_mm.default}


def _grouped_products(a: Tensor, b: Tensor, offsets_E: Tensor | None = None, *rest: Any, **options: Any) -> Tensor:
    """What ``grouped_mm`` computes, group by group: it does not support float64.

    Raises:
        NotImplementedError: groups of another layout, a bias, or another type for the result.
    """
    offsets_E = options.pop("offs", offsets_E)
    if offsets_E is None or a.dim() != 2 or any(x is not None for x in (*rest, *options.values())):
        raise NotImplementedError
    ends = offsets_E.tolist()
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    if b.dim() == 3:
        return torch.cat([a[s:e] @ b[i] for i, (s, e) in enumerate(spans)])
    return torch.stack([a[:, s:e] @ b[s:e] for s, e in spans])
