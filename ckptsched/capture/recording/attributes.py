"""What a model keeps besides tensors, and may decide by: other values may lead another way."""

from __future__ import annotations

import array
import hashlib
from collections import deque
from collections.abc import Iterable, Mapping
from inspect import isfunction, isroutine
from typing import Any

import numpy as np
from torch import Tensor, nn

from ...recompute.fsdp import class_before, has_hooks
from ..code_around import GLOBAL, Outside, looked_up
from ..wrappers import InPlace, forward_attribute

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
_OF_SHARDING = "__composable_api", "fsdp"  # of torch's, for what fully_shard has done to a module
DEPTH, LENGTH = 8, 1000  # what lies deeper, or in longer containers of containers, counts by length
OF_OBJECT = 3  # levels that an object counts for, besides its attributes: they lead everywhere
PLAIN = (bool, int, float, complex, str, bytes, type(None))
CONTAINERS = (list, tuple, deque, set, frozenset, Mapping)
_BUFFERS = (np.ndarray, bytearray, array.array)


def attributes_of(model: nn.Module) -> dict[str, object]:
    """What code of a model can look at, by path and name, as values that can be compared.

    Numbers, text, arrays, flags and functions that modules and their classes keep, also in
    containers and in objects such as a configuration, and globals that their code looks up; which
    classes and parts the modules have; which have hooks, or a forward of their own as an attribute.

    Args:
        model: The model.
    """
    found: dict[str, object] = {}
    known: dict[int, object] = {}
    kinds: dict[type[nn.Module], None] = {}
    for path, module in model.named_modules():
        dot, kind = f"{path}." if path else "", class_before(module)
        kinds[kind] = None
        found[f"{dot}(class and parts)"] = kind, kind.forward, tuple(module._modules)
        found[f"{dot}(hooks)"] = has_hooks(module)
        own = {**vars(module), "forward": forward_attribute(module)}
        for name, value in own.items():
            if any(word in name for word in _OF_SHARDING):
                continue
            if name not in _OF_EVERY_MODULE and not isinstance(value, Tensor | nn.Module):
                found[f"{dot}{name}"] = comparable(value, known, DEPTH)
    for outside in _around(kinds):
        found[str(outside)] = comparable(outside.value(), known, DEPTH)
    return found


def around(model: nn.Module) -> list[Outside]:
    """What the code of a model looks up outside of its modules, as far as it is data.

    Args:
        model: The model.
    """
    return _around(dict.fromkeys(class_before(module) for module in model.modules()))


def _around(kinds: Iterable[type[nn.Module]]) -> list[Outside]:
    return [outside for kind in kinds for outside in looked_up(kind)]


def is_outside(name: str) -> bool:
    """Whether a name that `attributes_of` gives is of no module of the model."""
    return name.startswith(GLOBAL)


def content(value: Any) -> object:
    """What lies in an array or the like, which can be written to; None for what is none."""
    if not isinstance(value, _BUFFERS):
        return None
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            return value.shape, repr(value)
        return value.dtype.str, value.shape, _digest(np.ascontiguousarray(value).view(np.uint8))
    return _digest(value)


def _digest(buffer: Any) -> bytes:
    return hashlib.blake2b(buffer, digest_size=16).digest()


def held_by(value: Any) -> Mapping[str, Any] | None:
    """The attributes of an object, also of one with slots, or what a function closes over.

    Args:
        value: Neither a container nor a module.

    Returns:
        For an object without slots its very dictionary; None where there is nothing.
    """
    if isfunction(value):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        return {name: cell.cell_contents for name, cell in cells if _is_filled(cell)} or None
    slots = [
        name
        for kind in type(value).__mro__
        for name in _names(vars(kind).get("__slots__", ()))
        if hasattr(value, name)
    ]
    own: Mapping[str, Any] | None = getattr(value, "__dict__", None)
    return {**{name: getattr(value, name) for name in slots}, **(own or {})} if slots else own


def _names(slots: Any) -> list[str]:
    found = [slots] if isinstance(slots, str) else list(slots)
    return [name for name in found if not name.startswith("__")]


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def is_looked_into(value: Any) -> bool:
    """Whether a container is not too long: a long one only where all that it holds is plain."""
    if len(value) <= LENGTH:
        return True
    held = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
    return {*map(type, held)} <= {*PLAIN}


def comparable(value: Any, known: dict[int, object], depth: int) -> object:
    """Something that is equal for what steers alike.

    Args:
        value: Any value.
        known: The same of objects that were looked at before, by id.
        depth: How many levels of containers to look into.
    """
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, np.generic):
        return type(value), value.tobytes()
    found = content(value)
    if found is not None:
        return type(value), found
    if isinstance(value, type) or (isroutine(value) and not isfunction(value)):
        return value
    if isinstance(value, InPlace):  # one that others have put elsewhere; it changes as it plans
        return type(value)
    inside: list[Any] = []
    if isinstance(value, CONTAINERS):
        if depth <= 0 or not is_looked_into(value):
            return type(value), len(value)
        if isinstance(value, set | frozenset):
            return type(value), frozenset(comparable(part, known, 0) for part in value)
        if isinstance(value, Mapping):
            inside = [part for pair in value.items() for part in pair]
        else:
            inside = list(value)
    elif isinstance(value, Tensor | nn.Module) or depth <= 0:
        return type(value)
    elif (held := held_by(value)) is not None:
        first = value if isfunction(value) else type(value)
        if id(value) not in known:  # a configuration is shared by many modules
            known[id(value)] = first  # and may lead back to itself
            known[id(value)] = first, comparable(held, known, max(0, depth - OF_OBJECT))
        return known[id(value)]
    elif isfunction(value):
        return value
    return type(value), tuple([comparable(part, known, depth - 1) for part in inside])
