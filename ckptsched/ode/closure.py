"""What a right-hand side reads besides its arguments: modules, and tensors with gradients."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, MutableMapping, MutableSequence, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

_LONGEST = 1000
KEPT = "_ckptsched_solves"
"""Attribute of a right-hand side that holds plans, and is nothing that it reads."""
_OF_TORCH = frozenset({*vars(nn.Module()), KEPT})
"""Attributes of a module that are torch's, or ours."""


@final
@dataclass(frozen=True)
class Place:
    """Where a function keeps a tensor that it reads: a closure's cell, an attribute, an item."""

    container: Any
    key: Any

    def get(self) -> Any:
        """What is there now."""
        if isinstance(self.container, types.CellType):
            return self.container.cell_contents
        return self.container[self.key]

    def put(self, value: Any) -> None:
        """Put something else there."""
        if isinstance(self.container, types.CellType):
            self.container.cell_contents = value
        else:
            self.container[self.key] = value


@final
@dataclass(frozen=True)
class Closure:
    """Everything with a gradient that a function was found to read."""

    modules: tuple[nn.Module, ...]
    """Modules: the function itself, or those that it calls."""
    places: tuple[Place, ...]
    """Where tensors are that require a gradient and belong to no module."""
    generators: tuple[torch.Generator, ...] = ()
    """Random generators that belong to no module."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The distinct tensors in the places, as they are now."""
        return tuple({id(p.get()): p.get() for p in self.places}.values())

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """All that gradients may be wanted for: the modules' parameters, then the tensors."""
        owned = (p for module in self.modules for p in module.parameters())
        found = {id(p): p for p in (*owned, *self.tensors)}
        return tuple(p for p in found.values() if p.requires_grad)

    @contextmanager
    def replaced(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Let the function read other tensors meanwhile.

        Args:
            tensors: One for each of `tensors`, in order; none to leave all as it is.
        """
        if not tensors:
            yield
            return
        before = [place.get() for place in self.places]
        order = {id(t): k for k, t in enumerate({id(t): t for t in before}.values())}
        try:
            for place, value in zip(self.places, before, strict=True):
                place.put(tensors[order[id(value)]])
            yield
        finally:
            for place, value in zip(self.places, before, strict=True):
                place.put(value)


def find_closure(func: Callable[..., Any]) -> Closure:
    """Find what a function reads: in cells, globals, defaults, attributes, lists and dicts of them.

    Of a module these are its parameters and, among its other attributes, tensors that are leaves:
    one with a graph may be left from a call before, and that graph be gone. What is hidden
    otherwise, in a C extension say, is not found; whoever needs it then refuses it, because its
    gradient would be lost (`unknown_leaves`).

    Args:
        func: A module, a function, a method, a partial, or an object that can be called.
    """
    modules: dict[int, nn.Module] = {}
    places: list[Place] = []
    generators: list[torch.Generator] = []
    seen: set[int] = set()
    # Beside each value the parameters of the module that it was found in; None outside of one.
    ahead: list[tuple[Any, set[int] | None]] = [(func, None)]
    while ahead:
        value, owned = ahead.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Generator):
            generators.append(value)
            continue
        if isinstance(value, nn.Module):
            modules[id(value)] = value
            owned = {id(p) for p in value.parameters()}
        for place in _places(value):
            try:
                inner = place.get()
            except ValueError:  # a cell that nothing has filled yet
                continue
            if isinstance(inner, Tensor):
                fits = owned is None or (inner.is_leaf and id(inner) not in owned)
                if inner.requires_grad and fits:
                    places.append(place)
            elif _may_hold(inner) if owned is None else _may_read(inner):
                ahead.append((inner, owned))
        ahead += [(inner, owned) for inner in _constants(value)]
    return Closure(tuple(modules.values()), tuple(places), tuple(generators))


def unknown_leaves(outputs: Iterable[Node | None], known: Iterable[Tensor]) -> list[Tensor]:
    """Leaves that a graph leads to, and that are not among those whose gradients are taken.

    Args:
        outputs: Where the graph ends.
        known: Tensors; what lies behind one of them is taken care of.
    """
    known = list(known)
    stops = {id(t) for t in known}
    seen = {t.grad_fn for t in known if t.grad_fn is not None}
    found: dict[int, Tensor] = {}
    ahead = list(outputs)
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in stops:
            found[id(leaf)] = leaf
        ahead += [before for before, _ in node.next_functions]
    return list(found.values())


def _may_read(value: Any) -> bool:
    """Whether a module may read tensors from what an attribute of it holds.

    Not from what is neither a container nor can be called, such as the trainer that holds a module
    and, with it, a whole program.
    """
    held = (MutableMapping, MutableSequence, tuple)
    return _may_hold(value) and (isinstance(value, held) or callable(value))


def _may_hold(value: Any) -> bool:
    """Whether to look inside: not into libraries, nor into what is a number or a text."""
    if isinstance(value, (nn.Module, torch.Generator)):
        return True
    if isinstance(value, (types.ModuleType, type, str, bytes, int, float, complex)):
        return False
    library = (getattr(value, "__module__", None) or "").split(".")[0]
    return library not in ("torch", "builtins")


def _places(value: Any) -> Iterator[Place]:
    """Where a value keeps others, and they can be replaced."""
    if isinstance(value, nn.Module):
        for part in value.modules():
            if not type(part).__module__.startswith("torch."):
                yield from (Place(vars(part), key) for key in vars(part) if key not in _OF_TORCH)
    elif isinstance(value, types.FunctionType):
        yield from (Place(cell, None) for cell in value.__closure__ or ())
        names = global_names(value.__code__)
        yield from (Place(value.__globals__, n) for n in names if n in value.__globals__)
    elif isinstance(value, (MutableMapping, MutableSequence)):
        # A long one is data, and the function is looked at in every call.
        if len(value) <= _LONGEST:
            keys = value if isinstance(value, MutableMapping) else range(len(value))
            yield from (Place(value, key) for key in keys)
    elif not isinstance(value, (functools.partial, types.MethodType, tuple)):
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            yield from (Place(attributes, key) for key in attributes if key != KEPT)


def global_names(code: types.CodeType) -> set[str]:
    """Names that a function, or one inside it, may look up among the globals."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if inspect.iscode(constant):
            names |= global_names(constant)
    return names


def _constants(value: Any) -> list[Any]:
    """What else a value holds, where nothing can be replaced."""
    if isinstance(value, functools.partial):
        return [value.func, value.keywords, *filter(_may_hold, value.args)]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, types.FunctionType):
        return list(filter(_may_hold, (value.__defaults__ or ())))
    if isinstance(value, tuple):
        return list(filter(_may_hold, value))
    if isinstance(value, nn.Module):
        return []
    return [type(value).__call__] if callable(value) else []
