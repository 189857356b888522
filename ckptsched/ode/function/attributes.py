"""What a function keeps for itself besides parameters and buffers: attributes, cells, items.

Such as noise that it draws when it is first evaluated. Measuring a function leaves these as they
were, and a run in the backward finds what the forward pass left. Whole numbers are left alone: most
are counters of evaluations, and each is one.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence
from contextlib import contextmanager
from typing import Any, final

from torch import Tensor, nn

from ...base.errors import ExecutionError
from ...torch_state.foreign_generators import ForeignGenerators
from .places import LONGEST, NOT_READ, Place, global_names, walk

_NOTHING: Any = object()
_LIBRARY: Any = object()
"""Marks the attributes of a module of torch's."""
_FEW = 16
"""Items of a list that is no trajectory."""


@final
class Attributes:
    """All of it before a function is measured, to be put back after that."""

    def __init__(self, func: Callable[..., Any]) -> None:
        """Take down references; nothing is copied but lists of them.

        Args:
            func: The function.
        """
        self._func = func
        self._dictionaries: list[tuple[MutableMapping[Any, Any], dict[Any, Any]]] = []
        self._lists: list[tuple[MutableSequence[Any], list[Any], int]] = []
        self._sets: list[tuple[set[Any], set[Any]]] = []
        self._places: list[tuple[Place, Any]] = []
        values: list[Any] = []
        for visit in walk(func):
            self._note(visit.value)
            values += [visit.value, *(place.look() for place in visit.places)]
            for place in visit.places:
                if not isinstance(place.container, (MutableMapping, MutableSequence, Place)):
                    self._places.append((place, place.look(_NOTHING)))
        values += [value for _, then in self._dictionaries for value in then.values()]
        values += [value for _, value in self._places]
        # Python's and numpy's generators, from which noise may have come.
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
                place = Place(value.__globals__, name)
                self._places.append((place, place.look(_NOTHING)))
        elif isinstance(getattr(value, "__dict__", None), dict):
            self._dictionaries.append((vars(value), dict(vars(value))))

    def put_back(self) -> int:
        """Leave everything as it was.

        Returns:
            Bytes of the tensors that the function had come to keep.
        """
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
        _put(self._places)
        self._foreign.restore()
        return sum(found.values())


def _head(items: MutableSequence[Any]) -> list[Any]:
    """A list's items; none of a long one, of which the end alone is put back."""
    return list(items) if len(items) <= LONGEST else []


def _own(module: nn.Module) -> dict[Any, Any]:
    """The attributes of a module that are none of torch's."""
    if not type(module).__module__.startswith("torch."):
        return {key: value for key, value in vars(module).items() if key not in NOT_READ}
    # A recurrent layer keeps a list of its parameters there, and brings it up to date itself.
    shown = {key: value for key, value in vars(module).items() if not key.startswith("_")}
    return {key: value for key, value in shown.items() if key not in NOT_READ} | {_LIBRARY: None}


@final
class Found:
    """What a function was left with by the forward pass."""

    def __init__(self, func: Callable[..., Any], begun: Found | None = None) -> None:
        """Take down what is there now.

        Args:
            func: The function.
            begun: The same before the forward pass.
        """
        self._places: list[tuple[Place, Any]] = []
        self._lists: list[tuple[MutableSequence[Any], list[Any]]] = []
        # What is held keeps its id.
        self._held: dict[int, tuple[str, Tensor, int]] = {}
        for visit in walk(func):
            if isinstance(visit.value, nn.Module):
                for part in visit.value.modules():
                    self._hold(part._buffers)
            few = isinstance(visit.value, (MutableMapping, MutableSequence))
            if few and len(visit.value) > _FEW:
                continue
            places = [*visit.places, *_on_library(visit.value)]
            found = [(place, place.look(_NOTHING)) for place in places]
            found = [(place, value) for place, value in found if _decides(value)]
            if found and isinstance(visit.value, MutableSequence):
                self._lists.append((visit.value, list(visit.value)))
            else:
                self._places += found
            self._hold({str(place.key): value for place, value in found})
        # A tensor that the forward pass itself has changed is no constant of the function.
        before = {} if begun is None else begun._held
        self._steady = [
            (name, tensor, version)
            for key, (name, tensor, version) in self._held.items()
            if key not in before or before[key][2] == version
        ]
        self._changed: list[tuple[Place, Any]] = []
        self._longer: list[tuple[MutableSequence[Any], list[Any]]] = []

    def _hold(self, values: Mapping[str, Any]) -> None:
        tensors = [(name, x) for name, x in values.items() if isinstance(x, Tensor)]
        # Those that have gradients have stand-ins, and inference tensors no versions.
        kept = [(name, x) for name, x in tensors if not x.requires_grad and not x.is_inference()]
        self._held |= {id(x): (name, x, x._version) for name, x in kept}

    def look(self) -> None:
        """See what of it is another by now; called once before a backward.

        Raises:
            ExecutionError: A tensor that the forward pass left alone was changed in place.
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
            (place, value)
            for place, value in self._places
            if not _as_it_was(place.look(_NOTHING), value)
        ]
        self._longer = [(items, then) for items, then in self._lists if not _same(items, then)]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Around what is run again: everything is there as the forward pass left it."""
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
        roots = [(place.root, place.root.look(_NOTHING)) for place, _ in self._changed]
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
    """Whether nothing is to be put back: a whole number that changes counts evaluations."""
    return now is then or int in (type(now), type(then))


def _on_library(value: Any) -> Iterator[Place]:
    """Tensors that were left with a module of torch's."""
    if isinstance(value, nn.Module):
        for module in value.modules():
            if type(module).__module__.startswith("torch."):
                own = ((k, v) for k, v in vars(module).items() if not k.startswith("_"))
                yield from (Place(vars(module), k) for k, v in own if isinstance(v, Tensor))


def _same(items: MutableSequence[Any], then: list[Any]) -> bool:
    return len(items) == len(then) and all(map(_as_it_was, items, then))


def _fill(lists: list[tuple[MutableSequence[Any], list[Any]]]) -> None:
    for items, then in lists:
        items.clear()
        items.extend(then)


def _put(values: list[tuple[Place, Any]]) -> None:
    for place, value in values:
        now = place.look(_NOTHING)
        if _as_it_was(now, value):
            continue
        if value is _NOTHING:
            place.empty()
        elif now is not _NOTHING or not isinstance(place.container, (Place, MutableSequence)):
            place.put(value)


def _tensors(func: Callable[..., Any]) -> Iterator[Tensor]:
    for visit in walk(func):
        for place in visit.places:
            value = place.look()
            if isinstance(value, Tensor):
                yield value
