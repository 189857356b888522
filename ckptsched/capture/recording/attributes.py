"""What a model keeps besides tensors, and may decide by: other values may lead another way."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import isroutine
from typing import Any

from torch import Tensor, nn

from ...recompute.fsdp import class_before, has_hooks
from ..wrappers import InPlace, forward_attribute

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
_OF_SHARDING = "__composable_api", "fsdp"  # of torch's, for what fully_shard has done to a module
_DEPTH, _LENGTH = 4, 1000  # what lies deeper, or in longer containers, counts by type and length


def attributes_of(model: nn.Module) -> dict[str, object]:
    """What code of a model can look at, by path and name, as values that can be compared.

    Numbers, text, flags and functions that modules keep, also in containers and in objects such as
    a configuration; which classes and parts the modules have; which have hooks, or a forward of
    their own as an attribute.

    Args:
        model: The model.
    """
    found: dict[str, object] = {}
    known: dict[int, object] = {}
    for path, module in model.named_modules():
        dot = f"{path}." if path else ""
        found[f"{dot}(class and parts)"] = class_before(module), tuple(module._modules)
        found[f"{dot}(hooks)"] = has_hooks(module)
        own = {**vars(module), "forward": forward_attribute(module)}
        for name, value in own.items():
            if any(word in name for word in _OF_SHARDING):
                continue
            if name not in _OF_EVERY_MODULE and not isinstance(value, Tensor | nn.Module):
                found[f"{dot}{name}"] = _comparable(value, known, _DEPTH)
    return found


def _comparable(value: Any, known: dict[int, object], depth: int) -> object:
    if isinstance(value, bool | int | float | complex | str | bytes | None):
        return type(value), value
    if isinstance(value, type) or isroutine(value):
        return value
    if isinstance(value, InPlace):  # one that others have put elsewhere; it changes as it plans
        return type(value)
    inside: list[Any] = []
    if depth and isinstance(value, list | tuple) and len(value) <= _LENGTH:
        inside = list(value)
    elif depth and isinstance(value, set | frozenset) and len(value) <= _LENGTH:
        return type(value), frozenset(_comparable(part, known, 0) for part in value)
    elif depth and isinstance(value, Mapping) and len(value) <= _LENGTH:
        inside = [part for pair in value.items() for part in pair]
    elif isinstance(value, list | tuple | set | frozenset | Mapping):
        return type(value), len(value)
    elif depth and not isinstance(value, Tensor | nn.Module) and hasattr(value, "__dict__"):
        if id(value) not in known:  # a configuration is shared by many modules
            known[id(value)] = type(value)  # and may lead back to itself
            known[id(value)] = type(value), _comparable(vars(value), known, depth - 1)
        return known[id(value)]
    return type(value), tuple([_comparable(part, known, depth - 1) for part in inside])
