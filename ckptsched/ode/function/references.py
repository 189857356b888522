"""A walk over all objects that a function may read, and the references through which it does.

A reference is a closure cell, a global, a default, an attribute, or an item of a list, dict or
tuple.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

LONGEST = 1000
"""Items of a list that is looked at; a longer one is data."""
KEPT = "_ckptsched_solves"
"""Attribute of a right-hand side that holds plans, and is nothing that it reads."""
NOT_READ = frozenset({*vars(nn.Module()), KEPT})
"""Attributes of a module that are torch's, or ours."""
_PROXIES = (weakref.ProxyType, weakref.CallableProxyType)

Owned = set[int] | None
"""The parameters, by id, of the module that something was found in; None outside of one."""


@final
@dataclass(frozen=True)
class Reference:
    """One reference of a container to an object, which can be pointed to another object.

    For an item of a tuple, which cannot change, the container is the reference to the tuple:
    that one is pointed to a new tuple.
    """

    container: Any
    key: Any

    def get(self) -> Any:
        """The object referred to now; an error of Python's where there is none."""
        container = self.container
        if isinstance(container, types.CellType):
            return container.cell_contents
        if isinstance(container, Reference):
            return container.get()[self.key]
        # An exact dict first: to ask the abstract classes is slow, and this is done in each call.
        if type(container) is dict or isinstance(container, (MutableMapping, MutableSequence)):
            return container[self.key]
        return getattr(container, self.key)

    def look(self, missing: Any = None) -> Any:
        """The object referred to now, or `missing` where there is none."""
        try:
            return self.get()
        except (ValueError, LookupError, AttributeError):
            return missing

    def put(self, value: Any) -> None:
        """Point it to another object."""
        container, key = self.container, self.key
        if isinstance(container, types.CellType):
            container.cell_contents = value
        elif isinstance(container, Reference):
            before = container.get()
            # Not by its own constructor, which may take anything: a named tuple takes its parts.
            items = (*before[:key], value, *before[key + 1 :])
            container.put(tuple.__new__(type(before), items))
        elif isinstance(container, (MutableMapping, MutableSequence)):
            container[key] = value
        elif isinstance(container, functools.partial):
            # Its attributes are read-only; this is how it is unpickled.
            container.__setstate__(  # type: ignore[attr-defined]
                (container.func, value, container.keywords, vars(container) or None)
            )
        elif isinstance(container, type):
            setattr(container, key, value)
        else:  # also where the class forbids it, as a frozen one does
            object.__setattr__(container, key, value)

    def empty(self) -> None:
        """Remove it: empty the cell, delete the item or attribute; lists and tuples stay."""
        container, key = self.container, self.key
        if isinstance(container, types.CellType):
            del container.cell_contents
        elif isinstance(container, MutableMapping):
            container.pop(key, None)
        elif not isinstance(container, (Reference, MutableSequence)):
            object.__delattr__(container, key)

    @property
    def root(self) -> Reference:
        """The reference that `put` changes: for an item of a tuple, the one to the outer tuple."""
        reference = self
        while isinstance(reference.container, Reference):
            reference = reference.container
        return reference


@final
@dataclass(frozen=True)
class Holder:
    """An object that the walk came to, and the references that it holds."""

    value: Any
    owned: Owned
    references: list[Reference]


def walk(func: Callable[..., Any]) -> Iterator[Holder]:
    """Yield every object that a function, method, module or partial may read, each once."""
    seen: set[int] = set()
    ahead: list[tuple[Any, Owned, Reference | None]] = [(func, None, None)]
    while ahead:
        value, owned, here = ahead.pop()
        value = _behind(value)
        # A tuple is visited through each reference to it: each has to be known.
        if id(value) in seen:
            continue
        if type(value) is not tuple:
            seen.add(id(value))
        if isinstance(value, nn.Module):
            parts = list(value.modules())
            owned = {id(p) for part in parts for p in part._parameters.values()}
            references, others = _of_module(parts)
        else:
            references, others = _inside(value, here)
        yield Holder(value, owned, references)
        for reference in references:
            inner = reference.look()
            if not isinstance(inner, Tensor) and (
                _may_hold(inner) if owned is None else _may_read(inner)
            ):
                ahead.append((inner, owned, reference))
        ahead += [(inner, owned, None) for inner in others]


def global_names(code: types.CodeType) -> set[str]:
    """Names that a function, or one inside it, may look up among the globals."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if inspect.iscode(constant):
            names |= global_names(constant)
    return names


def _behind(value: Any) -> Any:
    """The object behind a weak reference, and the module behind a proxy."""
    if isinstance(value, weakref.ReferenceType):
        return value()
    if type(value) in _PROXIES and isinstance(value, nn.Module):
        return value.parameters.__self__  # type: ignore[attr-defined]  # of a bound method
    return value


def _may_read(value: Any) -> bool:
    """Whether a module may read tensors from what an attribute of it holds.

    Not from an object that is neither a container nor callable, such as the trainer that holds
    the module and, with it, everything else that runs.
    """
    held = (MutableMapping, MutableSequence, set, tuple, types.SimpleNamespace)
    return _may_hold(value) and (isinstance(value, held) or callable(value))


def _may_hold(value: Any) -> bool:
    """Whether to look inside: not into libraries, nor into what is a number or a text."""
    if isinstance(value, (nn.Module, torch.Generator)):
        return True
    if isinstance(value, (types.ModuleType, type, str, bytes, int, float, complex, type(None))):
        return False
    library = (getattr(value, "__module__", None) or "").split(".")[0]
    return library not in ("torch", "builtins")


def _of_module(parts: list[nn.Module]) -> tuple[list[Reference], list[Any]]:
    """The references of a module's parts, and the functions that are their methods."""
    users = [part for part in parts if not type(part).__module__.startswith("torch.")]
    references = [
        Reference(vars(part), key) for part in users for key in vars(part) if key not in NOT_READ
    ]
    functions: list[Any] = []
    for kind in {type(part): None for part in users}:
        own, of_class = _methods(kind, "forward")
        functions += own
        references += of_class
    return references, functions


def _inside(value: Any, here: Reference | None) -> tuple[list[Reference], list[Any]]:
    """What an object that is no module refers to: what can be changed, and what not.

    `here` is the reference that leads to it, where it is known.
    """
    if isinstance(value, types.FunctionType):
        names = global_names(value.__code__)
        references = [
            *(Reference(cell, None) for cell in value.__closure__ or ()),
            *(Reference(value.__globals__, n) for n in names if n in value.__globals__),
            *(Reference(vars(value), key) for key in vars(value) if key != KEPT),
            *(Reference(value, "__defaults__"), Reference(value, "__kwdefaults__")),
        ]
        return references, []
    # A long container is data, and the function is looked at in every call.
    if isinstance(value, (MutableMapping, MutableSequence)):
        keys = value if isinstance(value, MutableMapping) else range(len(value))
        return [Reference(value, key) for key in keys] if len(value) <= LONGEST else [], []
    if isinstance(value, tuple):
        known = here is not None and len(value) <= LONGEST
        return [Reference(here, key) for key in range(len(value))] if known else [], []
    if isinstance(value, functools.partial):
        return [Reference(value, "args"), Reference(value, "keywords")], [value.func]
    if isinstance(value, types.MethodType):
        functions, references = _methods(type(value.__self__), value.__func__.__name__)
        return references, [value.__self__, value.__func__, *functions]
    functions, references = _methods(type(value), "__call__") if callable(value) else ([], [])
    references = [*_attributes(value), *references]
    if isinstance(value, (set, frozenset)):
        return references, list(filter(_may_hold, value)) if len(value) <= LONGEST else []
    return references, functions


def _attributes(value: Any) -> Iterator[Reference]:
    """The attributes of an object, also those without a dictionary."""
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        yield from (Reference(attributes, key) for key in attributes if key != KEPT)
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ()) if _is_users(kind) else ()
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                private = name.startswith("__") and not name.endswith("__")
                yield Reference(value, f"_{kind.__name__.lstrip('_')}{name}" if private else name)


def _methods(kind: type, entry: str) -> tuple[list[Any], list[Reference]]:
    """The methods that `entry` of a class may call, and the class attributes that these may read.

    Found by the names in their code, so that there may be some too many.
    """
    functions: list[types.FunctionType] = []
    references: list[Reference] = []
    own = [k for k in kind.__mro__ if _is_users(k)]
    ahead, seen = [entry], set[str]()
    while ahead and own:
        name = ahead.pop()
        if name in seen:
            continue
        seen.add(name)
        for k in own:
            value = vars(k).get(name)
            function = getattr(value, "__func__", getattr(value, "fget", value))
            if isinstance(function, types.FunctionType):
                functions.append(function)
                ahead += global_names(function.__code__)
            elif isinstance(value, Tensor) or _may_hold(value):
                references.append(Reference(k, name))
    return functions, references


def _is_users(kind: type) -> bool:
    return kind.__module__.split(".")[0] not in ("torch", "builtins", "functools", "typing", "abc")
