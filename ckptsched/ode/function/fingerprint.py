"""Keys of functions, equal for those that compute the same but for the values of tensors.

A right-hand side is often made anew for each solve, as a lambda or a closure inside a training
loop. It is another object each time, made by the same lines of code from the same parts, and one
plan serves all of them.
"""

from __future__ import annotations

import dis
import functools
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any, final

import torch
from torch import Tensor

from .references import global_names

_LONGEST = 1000
_BY_VALUE = (int, str, bytes, type(None), torch.dtype, torch.device, types.EllipsisType)


@final
class Identity:
    """Equal for one object alone, and for nothing once that is gone; does not keep it alive."""

    __slots__ = ("_id", "_reference")

    def __init__(self, value: Any) -> None:
        """Refer to an object; a TypeError where its kind cannot be referred to weakly."""
        self._reference = weakref.ref(value)
        self._id = id(value)

    def __hash__(self) -> int:
        return self._id

    def __eq__(self, other: object) -> bool:
        mine = self._reference()
        return mine is not None and isinstance(other, Identity) and mine is other._reference()


def fingerprint(func: Callable[..., Any]) -> Hashable | None:
    """The key of a function: its code, and the objects in its closure, defaults and globals.

    Equal are tensors of one layout, numbers and texts of one value, and containers and functions of
    equal parts; modules and all other objects only where they are the same. Globals count where the
    function, or one of its file that it calls, looks them up. Names that a function assigns itself,
    as `nonlocal` or `global`, are counters of its own and do not count. None where there is no key,
    as with a list of more than 1,000 items.
    """
    try:
        return _Description().of(func)
    except (TypeError, RecursionError):
        return None


@final
class _Description:
    """One walk over the parts of a function; an object met again is described by its number."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}
        self._globals: dict[str, Any] | None = None
        """Globals of the first function; those of another file are a library's."""

    def of(self, value: Any) -> Hashable:
        if isinstance(value, _BY_VALUE):
            return type(value), value
        if isinstance(value, (float, complex)):
            return type(value), repr(value)  # a NaN is not equal to itself
        if id(value) in self._seen:
            return "again", self._seen[id(value)]
        self._seen[id(value)] = len(self._seen)
        if isinstance(value, Tensor):
            return layout(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, functools.partial):
            return "partial", *map(self.of, (value.func, value.args, value.keywords))
        if isinstance(value, types.MethodType):
            return "method", self.of(value.__func__), self.of(value.__self__)
        if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
            _check_length(value)
            return type(value), *map(self.of, value)
        if isinstance(value, torch.Size):
            return torch.Size, tuple(value)
        if type(value) is dict:
            _check_length(value)
            return dict, *((self.of(key), self.of(item)) for key, item in value.items())
        return Identity(value)

    def _function(self, function: types.FunctionType) -> Hashable:
        code = function.__code__
        if self._globals is None:
            self._globals = function.__globals__
        own = _assigned(code)
        cells = tuple(
            name in own or self._cell(cell)
            for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True)
        )
        given = self.of(function.__defaults__), self.of(function.__kwdefaults__)
        looked_up: tuple[Hashable, ...] = ()
        if function.__globals__ is self._globals:
            names = sorted((global_names(code) & self._globals.keys()) - own)
            looked_up = tuple((name, self._global(self._globals[name])) for name in names)
        return code, id(function.__globals__), cells, given, looked_up

    def _cell(self, cell: types.CellType) -> Hashable:
        try:
            return self.of(cell.cell_contents)
        except ValueError:  # nothing has filled it yet
            return "empty"

    def _global(self, value: Any) -> Hashable:
        if isinstance(value, types.FunctionType) and value.__globals__ is not self._globals:
            return Identity(value)
        try:
            return self.of(value)
        except TypeError:  # long data: that it is the same has to do
            return type(value), id(value)


def _assigned(code: types.CodeType) -> frozenset[str]:
    """Names of cells and globals that a function assigns."""
    kinds = ("STORE_DEREF", "STORE_GLOBAL")
    if not {dis.opmap[kind] for kind in kinds} & set(code.co_code[::2]):
        return frozenset()  # taking the code apart is slow, and done in each call
    return frozenset(i.argval for i in dis.get_instructions(code) if i.opname in kinds)


def layout(tensor: Tensor) -> Hashable:
    """A key of all about a tensor but its values: shape, dtype, layout, device, requires_grad."""
    stride = tensor.stride() if tensor.layout is torch.strided else None
    kind = Tensor, tensor.dtype, tensor.layout, str(tensor.device), tensor.requires_grad
    return *kind, tuple(tensor.shape), stride


def _check_length(items: tuple[Any, ...] | list[Any] | dict[Any, Any]) -> None:
    if len(items) > _LONGEST:
        raise TypeError(f"{len(items)} items are too many to tell")
