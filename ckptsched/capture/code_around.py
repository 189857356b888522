"""What the code of a module looks up outside of modules: attributes of its class, and globals.

A flag, a table or a rate that lies there steers a forward as an attribute of the module does.
"""

from __future__ import annotations

import argparse
import array
import inspect
import sys
import types
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from torch import Tensor, nn

GLOBAL = "global "
"""How the names of what lies outside of modules begin."""

MISSING: Any = object()
"""What is found where there is nothing."""

_NOT_USERS = frozenset({"torch", "numpy", "ckptsched", "builtins"}) | sys.stdlib_module_names
# What may lie there and be data; anything else leads to libraries and to what runs besides.
_DATA = (
    *(bool, int, float, complex, str, bytes, type(None), np.generic, np.ndarray, bytearray),
    *(list, tuple, dict, set, frozenset, deque, array.array, types.SimpleNamespace),
    argparse.Namespace,
)


@final
@dataclass(frozen=True, eq=False, slots=True)
class Outside:
    """A variable that lies outside of modules."""

    scope: Mapping[str, Any]
    """Where it lies: what a module of Python or a class holds."""
    where: str
    """The name of that."""
    name: str
    """Its own."""

    def value(self) -> Any:
        """What it holds now; `MISSING` where it is gone, or holds no data."""
        found = self.scope.get(self.name, MISSING)
        return found if isinstance(found, _DATA) else MISSING

    def __str__(self) -> str:
        """Its name, for people."""
        return f"{GLOBAL}{self.where}.{self.name}"


_known: MutableMapping[type, list[Outside]] = weakref.WeakKeyDictionary()


def looked_up(kind: type[nn.Module]) -> list[Outside]:
    """The variables that methods of a class, and functions that they call, may look up.

    Those that the forward may come to, as far as names in the code tell; so there may be some too
    many. Functions of torch, numpy and Python's own library are not looked into.

    Args:
        kind: A class of modules.
    """
    if kind not in _known:
        _known[kind] = list(_search(kind)) if _is_users(kind) else []
    return _known[kind]


def _search(kind: type[nn.Module]) -> Iterator[Outside]:
    own = [(vars(base), base.__qualname__) for base in kind.__mro__ if _is_users(base)]
    ahead: list[tuple[Mapping[str, Any], str, str]] = [(*scope, "forward") for scope in own]
    seen = set[tuple[int, str]]()
    while ahead:
        scope, where, name = ahead.pop()
        if (id(scope), name) in seen or name not in scope:
            continue
        seen.add((id(scope), name))
        value = scope[name]
        if _is_data(name, value):
            yield Outside(scope, where, name)
        function = inspect.unwrap(getattr(value, "__func__", getattr(value, "fget", value)))
        if inspect.isfunction(function) and _is_users(function):
            for found in _names(function.__code__):
                ahead.append((function.__globals__, function.__module__, found))
                if scope is not function.__globals__:
                    ahead += [(*part, found) for part in own]


def _is_data(name: str, value: Any) -> bool:
    return isinstance(value, _DATA) and not isinstance(value, Tensor) and name[:2] != "__"


def _is_users(found: Any) -> bool:
    return (found.__module__ or "").partition(".")[0] not in _NOT_USERS


def _names(code: types.CodeType) -> set[str]:
    """Names that a function, or one inside it, may look up."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if inspect.iscode(constant):
            names |= _names(constant)
    return names
