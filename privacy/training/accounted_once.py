"""Which models were found accounted for already, so that a trainer of every round, or audit, need not ask again.

Two questions are the same if they are about the same module, with the same layers, hooks and plain attributes, mode,
shapes of records, and code of the loss. Values of parameters do not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

_PLAIN = (bool, int, float, str, bytes, type(None))
_DEPTH = 3
_accounted: WeakKeyDictionary[nn.Module, set[Hashable]] = WeakKeyDictionary()


def question(mode: type, module: nn.Module, loss: Callable[..., Any], records: Mapping[str, Tensor]) -> Hashable | None:
    """Return what the answer depends on; None if that is unknown, because the loss is not a plain function."""
    code = _code(loss)
    if code is None:
        return None
    layers = tuple(
        (name, type(layer), *_counts(layer), _plain(vars(layer)), tuple(_trained(layer)))
        for name, layer in module.named_modules()
    )
    shapes = tuple((name, tensor.dtype, tensor.shape[1:]) for name, tensor in sorted(records.items()))
    return mode, code, layers, shapes


def is_answered(module: nn.Module, asked: Hashable | None) -> bool:
    """Whether the question was answered well before."""
    return asked is not None and asked in _accounted.get(module, ())


def note_answer(module: nn.Module, asked: Hashable | None) -> None:
    """Remember that the question was answered well, for as long as the module lives."""
    if asked is not None:
        _accounted.setdefault(module, set()).add(asked)


def _code(function: object, depth: int = 0) -> Hashable | None:
    """Return what a function does, as far as can be told: its code, and what it keeps beside it."""
    if isinstance(function, partial):
        inner = _code(function.func, depth)
        given = _kept(dict(enumerate(function.args)) | function.keywords, depth)
        return inner and (inner, given)
    function = getattr(function, "__func__", function)
    if not isinstance(function, FunctionType):
        return None
    try:
        cells = {n: cell.cell_contents for n, cell in enumerate(function.__closure__ or ())}
    except ValueError:  # it uses a variable that has no value yet
        return None
    defaults = dict(enumerate(function.__defaults__ or ())) | (function.__kwdefaults__ or {})
    used = {name: function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__}
    return function.__code__, _kept(cells, depth), _kept(defaults, depth), _kept(used, depth)


def _kept(values: Mapping[Any, Any], depth: int) -> Hashable:
    """Return plain values, and what functions do that a function uses, to a depth: a loss is often wrapped."""
    functions = (FunctionType, MethodType, partial)
    inner = {key: value for key, value in values.items() if isinstance(value, functions)} if depth < _DEPTH else {}
    return _plain(values), tuple((str(key), _code(value, depth + 1)) for key, value in inner.items())


def _plain(values: Mapping[Any, Any]) -> Hashable:
    plain = ((str(name), type(value), value) for name, value in values.items() if isinstance(value, _PLAIN))
    return tuple(sorted(plain, key=lambda kept: kept[0]))


def _counts(layer: nn.Module) -> tuple[int, ...]:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return ("forward" in vars(layer), *(len(kind) for kind in hooks))


def _trained(layer: nn.Module) -> list[str]:
    return [key for key, p in layer._parameters.items() if p is not None and p.requires_grad]
