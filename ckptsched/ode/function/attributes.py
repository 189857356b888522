"""Attributes, cells and items that a function keeps for itself, besides parameters and buffers.

An example is noise that it draws when it is first evaluated. `Attributes` puts them back after the
function was measured; `ForwardAttributes` restores, for a run in the backward, those that the
forward pass left. Whole numbers are left alone: most are counters of evaluations, and each is one.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence
from contextlib import contextmanager
from typing import Any, final

from torch import Tensor, nn

from ...base.errors import ExecutionError
from ...torch_state.foreign_generators import ForeignGenerators
from .references import LONGEST, NOT_READ, Reference, global_names, walk

_NOTHING: Any = object()
_LIBRARY: Any = object()
"""Key that marks the attributes of a module of torch's."""
_FEW = 16
"""Most items of a list or dict that is restored in the backward; a longer one is a trajectory."""


@final
class Attributes:
    """The attributes, items and globals of a function before it is measured, to be put back."""

    def __init__(self, func: Callable[..., Any]) -> None:
        """Note them by reference; lists, sets and dicts are copied, tensors are not."""
        self._func = func
        self._dictionaries: list[tuple[MutableMapping[Any, Any], dict[Any, Any]]] = []
        self._lists: list[tuple[MutableSequence[Any], list[Any], int]] = []
        self._sets: list[tuple[set[Any], set[Any]]] = []
        self._references: list[tuple[Reference, Any]] = []
        values: list[Any] = []
        for holder in walk(func):
            self._note(holder.value)
            values += [holder.value, *(reference.look() for reference in holder.references)]
            for reference in holder.references:
                if not isinstance(
                    reference.container, (MutableMapping, MutableSequence, Reference)
                ):
                    self._references.append((reference, reference.look(_NOTHING)))
        values += [value for _, then in self._dictionaries for value in then.values()]
        values += [value for _, value in self._references]
        # Noise may be drawn from Python's and numpy's generators, too.
        self._foreign = ForeignGenerators(values)
        self._before = set(map(id, _tensors(func)))

    def _note(self, value: Any) -> None:
        if isinstance(value, nn.Module):
            for module in value.modules():
                self._dictionaries.append((vars(module), _own(module)))
                self._dictionaries.append((module._buffers, dict(module._buffers)))
        elif isinstance(value, MutableMapping):
            if len(value) <= LONGEST:
                self._dictionaries.append((value, dict(value)))
        elif isinstance(value, MutableSequence):
            self._lists.append((value, _head(value), len(value)))
        elif isinstance(value, set):
            self._sets.append((value, set(value)))
        elif isinstance(value, types.FunctionType):
            for name in global_names(value.__code__):
                reference = Reference(value.__globals__, name)
                self._references.append((reference, reference.look(_NOTHING)))
        elif isinstance(getattr(value, "__dict__", None), dict):
            self._dictionaries.append((vars(value), dict(vars(value))))

    def put_back(self) -> int:
        """Restore everything noted; returns the bytes of tensors that the function came to keep."""
        found = {id(t): t.nbytes for t in _tensors(self._func) if id(t) not in self._before}
        for dictionary, then in self._dictionaries:
            for key in [key for key in dictionary if key not in then]:
                if key not in NOT_READ and not (_LIBRARY in then and str(key).startswith("_")):
                    del dictionary[key]
            for key, value in then.items():
                if key is not _LIBRARY and not _as_it_was(dictionary.get(key, _NOTHING), value):
                    dictionary[key] = value
        for items, first, length in self._lists:
            while len(items) > length:
                items.pop()
            if length == len(first) and not _same(items, first):
                _fill([(items, first)])
        for members, before in self._sets:
            if members != before:
                members.clear()
                members.update(before)
        _put(self._references)
        self._foreign.restore()
        return sum(found.values())


def _head(items: MutableSequence[Any]) -> list[Any]:
    """A list's items; none of a long one, which is only cut to its former length."""
    return list(items) if len(items) <= LONGEST else []


def _own(module: nn.Module) -> dict[Any, Any]:
    """The attributes of a module that are none of torch's."""
    if not type(module).__module__.startswith("torch."):
        return {key: value for key, value in vars(module).items() if key not in NOT_READ}
    # A recurrent layer keeps a list of its parameters there, and brings it up to date itself.
    shown = {key: value for key, value in vars(module).items() if not key.startswith("_")}
    return {key: value for key, value in shown.items() if key not in NOT_READ} | {_LIBRARY: None}


@final
class ForwardAttributes:
    """The attributes, items and globals of a function as its forward pass left them.

    `begun` are the same before the forward pass.
    """

    def __init__(self, func: Callable[..., Any], begun: ForwardAttributes | None = None) -> None:
        """Note them by reference."""
        self._references: list[tuple[Reference, Any]] = []
        self._lists: list[tuple[MutableSequence[Any], list[Any]]] = []
        # What is held keeps its id.
        self._held: dict[int, tuple[str, Tensor, int]] = {}
        for holder in walk(func):
            if isinstance(holder.value, nn.Module):
                for part in holder.value.modules():
                    self._hold(part._buffers)
            few = isinstance(holder.value, (MutableMapping, MutableSequence))
            if few and len(holder.value) > _FEW:
                continue
            references = [*holder.references, *_on_library(holder.value)]
            found = [(reference, reference.look(_NOTHING)) for reference in references]
            found = [(reference, value) for reference, value in found if _decides(value)]
            if found and isinstance(holder.value, MutableSequence):
                self._lists.append((holder.value, list(holder.value)))
            else:
                self._references += found
            self._hold({str(reference.key): value for reference, value in found})
        # A tensor that the forward pass itself has changed is no constant of the function.
        before = {} if begun is None else begun._held
        self._steady = [
            (name, tensor, version)
            for key, (name, tensor, version) in self._held.items()
            if key not in before or before[key][2] == version
        ]
        self._changed: list[tuple[Reference, Any]] = []
        self._longer: list[tuple[MutableSequence[Any], list[Any]]] = []

    def _hold(self, values: Mapping[str, Any]) -> None:
        tensors = [(name, x) for name, x in values.items() if isinstance(x, Tensor)]
        # Those that have gradients have stand-ins, and inference tensors no versions.
        kept = [(name, x) for name, x in tensors if not x.requires_grad and not x.is_inference()]
        self._held |= {id(x): (name, x, x._version) for name, x in kept}

    def look(self) -> None:
        """Find those that changed since, once before a backward.

        An ExecutionError where a tensor that the forward pass left alone was changed in place.
        """
        for name, tensor, version in self._steady:
            if tensor._version != version:
                raise ExecutionError(
                    f"{name!r}, a tensor of shape {tuple(tensor.shape)} that f keeps and the "
                    "forward pass left alone, was changed in place between forward and backward, "
                    "so steps would run again with another; call backward before, or give f a new "
                    "tensor"
                )
        self._changed = [
            (reference, value)
            for reference, value in self._references
            if not _as_it_was(reference.look(_NOTHING), value)
        ]
        self._longer = [(items, then) for items, then in self._lists if not _same(items, then)]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Restore them in this context, and afterwards put back those that were there before it."""
        try:
            with self._there():
                yield
        finally:  # what runs again may change what it has not changed before
            self._steady = [(name, tensor, tensor._version) for name, tensor, _ in self._steady]

    @contextmanager
    def _there(self) -> Iterator[None]:
        if not self._changed and not self._longer:
            yield
            return
        roots = [(reference.root, reference.root.look(_NOTHING)) for reference, _ in self._changed]
        now = [(items, list(items)) for items, _ in self._longer]
        try:
            _put(self._changed)
            _fill(self._longer)
            yield
        finally:
            _put(roots)
            _fill(now)


def _decides(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.requires_grad  # those that do have stand-ins
    return value is not _NOTHING


def _as_it_was(now: Any, then: Any) -> bool:
    """Whether nothing is to be put back: the same object, or an int, which counts evaluations."""
    return now is then or int in (type(now), type(then))


def _on_library(value: Any) -> Iterator[Reference]:
    """References to tensors that are plain attributes of a module of torch's."""
    if isinstance(value, nn.Module):
        for module in value.modules():
            if type(module).__module__.startswith("torch."):
                own = ((k, v) for k, v in vars(module).items() if not k.startswith("_"))
                yield from (Reference(vars(module), k) for k, v in own if isinstance(v, Tensor))


def _same(items: MutableSequence[Any], then: list[Any]) -> bool:
    return len(items) == len(then) and all(map(_as_it_was, items, then))


def _fill(lists: list[tuple[MutableSequence[Any], list[Any]]]) -> None:
    for items, then in lists:
        items.clear()
        items.extend(then)


def _put(values: list[tuple[Reference, Any]]) -> None:
    for reference, value in values:
        now = reference.look(_NOTHING)
        if _as_it_was(now, value):
            continue
        if value is _NOTHING:
            reference.empty()
        elif now is not _NOTHING or not isinstance(
            reference.container, (Reference, MutableSequence)
        ):
            reference.put(value)


def _tensors(func: Callable[..., Any]) -> Iterator[Tensor]:
    for holder in walk(func):
        for reference in holder.references:
            value = reference.look()
            if isinstance(value, Tensor):
                yield value
