"""Everything that a model and its loss can remember from one call to the next, as far as Python shows it.

State hides in more places than buffers: plain attributes, lists and dictionaries, closures, default arguments, class
attributes, globals of the model's own module. Everything reachable is visited, so that a model that was used can be
put back to what it was, and compared with one that saw other records.
"""

from __future__ import annotations

import hashlib
import random
import sys
import sysconfig
import threading
from collections import UserDict, UserList, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_MOST_OBJECTS = 100_000
_INSTALLED = tuple({str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "purelib", "platlib")})
_HOLDERS = (threading.local, WeakKeyDictionary, WeakValueDictionary, UserDict, UserList, SimpleNamespace)
"""Of the standard library, what is made to hold things."""
_CachedFunction = type(cache(lambda: None))
_VALUES = (bool, int, float, complex, str, bytes, type(None))
_MISSING = object()


class Memory:
    """What was reachable from some objects when it was taken."""

    def __init__(self, **roots: object) -> None:
        """Remember the state of everything reachable from ``roots``, whose names are used in reports."""
        self._roots = roots
        self._undo = [undo for _, thing in _Walk(roots).places() if (undo := _undo_for(thing)) is not None]

    def restore(self) -> None:
        """Put everything back in place: the same objects, with what they held."""
        for undo in self._undo:
            undo()

    def fingerprint(self) -> dict[str, list[object]]:
        """Return what is held by now: path → numbers, texts and digests of tensors' bytes that were found there."""
        found: dict[str, list[object]] = {}
        for path, thing in _Walk(self._roots).places():
            found.setdefault(path, []).append(_fingerprint(thing))
        return found


_Place = tuple[str, Any]
"""Where a thing was found, in words that its author knows, and the thing."""


@dataclass(frozen=True)
class _Names:
    """Some names of a larger namespace: globals that a function uses, a class's attributes, slots."""

    get: Callable[[str], object]
    put: Callable[[str, Any], None]
    remove: Callable[[str], None]
    names: tuple[str, ...]


class _Walk:
    """Breadth first, so that a path is a shortest one; each object once.

    Attributes of modules are looked at whoever wrote them. Functions' globals and classes' attributes only where the
    code is the caller's own: libraries keep no records there, and walking through them takes long.
    """

    def __init__(self, roots: dict[str, object]) -> None:
        self._roots = roots
        self._own = {(getattr(root, "__module__", None) or "").partition(".")[0] for root in roots.values()}

    def places(self) -> Iterator[_Place]:
        """Yield everything reachable, numbers and texts too."""
        seen: dict[int, object] = {}  # the object itself too: let go of, its id could be used again
        waiting: deque[_Place] = deque(self._roots.items())
        while waiting and len(seen) < _MOST_OBJECTS:
            path, thing = waiting.popleft()
            if not isinstance(thing, _VALUES):
                if id(thing) in seen:
                    continue
                seen[id(thing)] = thing
            yield path, thing
            waiting.extend(self._inside(path, thing))

    def _inside(self, path: str, thing: Any) -> Iterator[_Place]:
        if isinstance(thing, dict):
            for number, (key, value) in enumerate(list(thing.items())):
                yield f"{path}.{key}" if isinstance(key, str) else f"{path}[{number}]", value
        elif isinstance(thing, list | tuple | deque):
            yield from ((f"{path}[{number}]", value) for number, value in enumerate(thing))
        elif isinstance(thing, set | frozenset):
            yield from ((f"{path}[{number}]", value) for number, value in enumerate(sorted(thing, key=repr)))
        elif isinstance(thing, FunctionType):
            yield from self._inside_function(path, thing)
        elif isinstance(thing, MethodType):
            yield path, thing.__self__
            yield path, thing.__func__
        elif isinstance(thing, staticmethod | classmethod):
            yield path, thing.__func__
        elif isinstance(thing, CellType):
            yield path, _value(lambda: thing.cell_contents)
        elif isinstance(thing, _Names):
            yield from ((f"{path}.{name}", _value(partial(thing.get, name))) for name in thing.names)
        elif isinstance(thing, type):
            if self._is_own(thing.__module__):
                yield path, _class_attributes(thing)
        elif isinstance(thing, ModuleType):
            if self._is_own(thing.__name__):
                yield path, _names_in(vars(thing), [name for name in vars(thing) if not name.startswith("__")])
        elif isinstance(thing, partial):
            yield from ((path, part) for part in (thing.func, thing.args, thing.keywords))
        elif isinstance(thing, _CachedFunction):
            yield path, thing.__wrapped__
        elif isinstance(thing, _HOLDERS):
            yield path, vars(thing)
        elif isinstance(thing, nn.Module | Tensor) or self._is_own(type(thing).__module__):
            yield from self._inside_object(path, thing)

    def _inside_object(self, path: str, thing: Any) -> Iterator[_Place]:
        if isinstance(space := getattr(thing, "__dict__", None), dict):
            yield path, space
        slots = [name for kind in type(thing).__mro__ for name in _slots(kind) if not name.startswith("__")]
        if slots and not isinstance(thing, Tensor):
            get, put, remove = (partial(act, thing) for act in (getattr, object.__setattr__, object.__delattr__))
            yield path, _Names(get, put, remove, tuple(slots))
        yield from ((kind.__name__, kind) for kind in type(thing).__mro__)  # what all objects of a class share

    def _inside_function(self, path: str, function: FunctionType) -> Iterator[_Place]:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            yield f"{path}.{name}", cell
        if self._is_own(function.__module__):
            yield path, function.__dict__
            yield f"{path}.default", function.__defaults__
            yield f"{path}.default", function.__kwdefaults__
            names = [name for name in _names_used(function.__code__) if not name.startswith("__")]
            yield function.__module__, _names_in(function.__globals__, sorted(names))

    def _is_own(self, module: str | None) -> bool:
        if not module or module == "builtins":
            return False
        if module.partition(".")[0] in self._own - {"torch"}:
            return True
        file = getattr(sys.modules.get(module), "__file__", None)
        return isinstance(file, str) and not _is_installed(file)


@cache
def _is_installed(file: str) -> bool:
    return str(Path(file).resolve()).startswith(_INSTALLED)


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _names_used(code: CodeType) -> set[str]:
    inner = [c for c in code.co_consts if isinstance(c, CodeType)]
    return set(code.co_names).union(*map(_names_used, inner))


def _names_in(space: dict[str, Any], names: Sequence[str]) -> _Names:
    return _Names(space.__getitem__, space.__setitem__, space.__delitem__, tuple(names))


def _class_attributes(kind: type) -> _Names:
    names = [n for n, value in vars(kind).items() if not n.startswith("__") or isinstance(value, FunctionType)]
    put, remove = partial(type.__setattr__, kind), partial(type.__delattr__, kind)
    return _Names(lambda name: vars(kind)[name], put, remove, tuple(names))


def _value(get: Callable[[], object]) -> object:
    try:
        return get()
    except (KeyError, AttributeError, ValueError):  # a name without a value, an empty cell
        return _MISSING


def _undo_for(thing: Any) -> Callable[[], None] | None:
    """Return what restores a mutable thing to what it is now; None if there is nothing to restore."""
    if isinstance(thing, dict):
        return _undo_dictionary(thing)
    if isinstance(thing, list | deque):
        return _undo_sequence(thing)
    if isinstance(thing, set):
        return _undo_set(thing)
    if isinstance(thing, CellType):
        return _undo_cell(thing)
    if isinstance(thing, _Names):
        return _undo_names(thing)
    if isinstance(thing, Tensor):
        return _undo_tensor(thing)
    if isinstance(thing, np.ndarray):
        return _undo_array(thing)
    if isinstance(thing, _CachedFunction):
        return thing.cache_clear  # what it holds is never shown; without it, it computes the same
    return _undo_generator(thing)


def _undo_dictionary(thing: dict[Any, Any]) -> Callable[[], None]:
    saved = list(thing.items())

    def undo() -> None:
        if list(thing) != [key for key, _ in saved] or any(thing[key] is not value for key, value in saved):
            thing.clear()
            thing.update(saved)

    return undo


def _undo_sequence(thing: list[Any] | deque[Any]) -> Callable[[], None]:
    saved = list(thing)

    def undo() -> None:
        if len(thing) != len(saved) or any(a is not b for a, b in zip(thing, saved, strict=True)):
            thing.clear()
            thing.extend(saved)

    return undo


def _undo_set(thing: set[Any]) -> Callable[[], None]:
    saved = set(thing)

    def undo() -> None:
        thing.clear()
        thing.update(saved)

    return undo


def _undo_cell(cell: CellType) -> Callable[[], None]:
    saved = _value(lambda: cell.cell_contents)

    def undo() -> None:
        if saved is not _MISSING:
            cell.cell_contents = saved

    return undo


def _undo_names(space: _Names) -> Callable[[], None]:
    saved = {name: _value(partial(space.get, name)) for name in space.names}

    def undo() -> None:
        for name, value in saved.items():
            now = _value(partial(space.get, name))
            if now is value:
                continue
            if value is _MISSING:
                space.remove(name)
            else:
                space.put(name, value)

    return undo


def _undo_tensor(tensor: Tensor) -> Callable[[], None] | None:
    if not _is_plain(tensor):
        return None
    saved = tensor.detach().clone()

    def undo() -> None:
        if tensor.shape != saved.shape or tensor.dtype != saved.dtype:
            tensor.data = saved.clone()
        elif not same_bits(tensor.detach(), saved):
            with torch.no_grad():
                tensor.copy_(saved)

    return undo


def _undo_array(array: np.ndarray[Any, Any]) -> Callable[[], None]:
    saved = array.copy()

    def undo() -> None:
        if array.flags.writeable and array.shape == saved.shape:
            array[...] = saved

    return undo


def _undo_generator(thing: Any) -> Callable[[], None] | None:
    if isinstance(thing, torch.Generator):
        drawn = thing.get_state()
        return partial(_take_up, thing, drawn)
    if isinstance(thing, random.Random):
        state = thing.getstate()
        return lambda: thing.setstate(state)
    if isinstance(thing, np.random.Generator):
        bits, position = thing.bit_generator, thing.bit_generator.state
        return lambda: setattr(bits, "state", position)
    return None


def _take_up(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def _is_plain(tensor: Tensor) -> bool:
    """Whether it has bytes: one that is lazy, sparse, quantised or on no device is left as it is."""
    return not is_lazy(tensor) and tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bytes: NaN equals itself, and −0 is not 0."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _fingerprint(thing: Any) -> object:
    if isinstance(thing, _VALUES):
        return repr(thing)
    if isinstance(thing, Tensor):
        digest = hashlib.blake2b(_bytes(thing).cpu().numpy().tobytes()).digest() if _is_plain(thing) else None
        return (str(thing.dtype), tuple(thing.shape), digest)
    if isinstance(thing, np.ndarray):
        return (str(thing.dtype), thing.shape, thing.tobytes() if thing.dtype != object else b"")
    if isinstance(thing, dict | list | set | tuple | deque | frozenset):
        return (type(thing).__name__, len(thing))
    return type(thing).__name__
