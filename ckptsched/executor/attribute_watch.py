"""Whether a model keeps what it kept at its last step, told at a glance.

`attributes_of` says what may steer a model, and takes milliseconds. Here the same places are gone
through once, and what lies in them is noted; from then on they are compared by identity, for the
most part without a loop of Python's own. The same object in the same place steers as before: what
can change inside is looked into. The other way round nothing follows, and `attributes_of` is asked.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from inspect import isfunction, isroutine
from itertools import chain
from operator import attrgetter, is_
from typing import Any, final

import numpy as np
from torch import Tensor, nn

from ..capture.recording.attributes import (
    CONTAINERS,
    DEPTH,
    OF_OBJECT,
    PLAIN,
    around,
    comparable,
    content,
    held_by,
    is_looked_into,
)
from ..capture.recording.calls import Place
from ..capture.wrappers import InPlace
from ..recompute.fsdp import HOOKS

_hooks_of = attrgetter(*HOOKS)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
# What cannot change inside, or where that is somebody else's affair.
_ATOMS = (*PLAIN, np.generic, type, nn.Module, InPlace)
_DEEPEST = DEPTH  # of what is searched for tensors
_MOST_BYTES = 1 << 20  # of an array that is read in each step; a larger one counts by identity


@final
class AttributeWatch:
    """What a model kept when this was made, in the places that `attributes_of` looks at.

    It holds no tensor, which would take its memory for longer than the model keeps it.
    """

    def __init__(self, model: nn.Module, kept: Iterable[Place]) -> None:
        """Look at a model.

        Args:
            model: The model.
            kept: Where its forward leaves values, so that others are there after each step.
        """
        named, tensors = list(model.named_modules()), dict[int, tuple[object, bool]]()
        modules = [module for _, module in named]
        left: dict[str, set[str]] = {path: set() for path, _ in named}
        for place in kept:
            if not (place.kind or place.steps):
                left[place.path].add(place.name)
        self._depths: dict[int, int] = {}
        self._objects: list[object] = [*modules]  # of which the class counts
        self._counted: list[Any] = [*chain.from_iterable(map(_hooks_of, modules))]
        # Dictionaries that are compared whole, and what else holds values.
        self._dicts: list[dict[Any, Any]] = [module._modules for module in modules]
        self._others: list[tuple[Any, Collection[str]]] = []
        self._compared: list[tuple[dict[str, Any], str, object]] = []
        self._arrays: list[tuple[Any, object]] = []
        for path, module in named:
            own, skipped = vars(module), left[path]
            for name in [n for n in own if n not in _OF_EVERY_MODULE and n not in skipped]:
                if _holds_tensor(own[name], tensors, _DEEPEST):
                    skipped.add(name)
                    self._compared.append((own, name, comparable(own[name], {}, DEPTH)))
                else:
                    self._enter(own[name], DEPTH)
            self._watch(own, skipped)
        self._outside = around(model)
        self._found = [outside.value() for outside in self._outside]
        for value in self._found:
            self._enter(value, DEPTH)
        self._types, self._counts = list(map(type, self._objects)), list(map(len, self._counted))
        self._sizes, self._names = list(map(len, self._dicts)), [*chain.from_iterable(self._dicts)]
        self._values = [*chain.from_iterable(map(dict.values, self._dicts))]
        self._contents = [_contents(*other) for other in self._others]

    def _enter(self, value: Any, depth: int) -> None:
        """Watch what can change inside of a value, as deep as `attributes_of` looks."""
        if isinstance(value, _ATOMS) or (isroutine(value) and not isfunction(value)):
            return
        if self._depths.get(id(value), -1) >= depth:
            return
        self._depths[id(value)] = depth
        self._objects.append(value)
        found = content(value)
        if found is not None:
            if getattr(value, "nbytes", 0) <= _MOST_BYTES:
                self._arrays.append((value, found))
        elif isinstance(value, CONTAINERS):
            if depth <= 0 or not is_looked_into(value):
                self._counted.append(value)
                return
            self._watch(value)
            for part in _contents(value):
                self._enter(part, depth - 1)
        elif depth > 0 and (held := held_by(value)) is not None:
            if held is getattr(value, "__dict__", None):
                self._enter(held, max(0, depth - OF_OBJECT))
            elif depth > OF_OBJECT:
                self._watch(value)
                for part in held.values():
                    self._enter(part, depth - OF_OBJECT - 1)

    def _watch(self, held: Any, skipped: Collection[str] = ()) -> None:
        if type(held) is dict and not skipped:
            self._dicts.append(held)
        elif not isinstance(held, tuple):  # which holds the same for good
            self._others.append((held, skipped))

    def sees_nothing_new(self) -> bool:
        """Whether all is as it was; False also where something new may say the same."""
        dicts = self._dicts
        return (
            list(map(len, dicts)) == self._sizes
            and all(map(is_, chain.from_iterable(map(dict.values, dicts)), self._values))
            and all(map(is_, chain.from_iterable(dicts), self._names))
            and all(map(is_, map(type, self._objects), self._types))
            and list(map(len, self._counted)) == self._counts
            and all(
                _same(_contents(*other), then)
                for other, then in zip(self._others, self._contents, strict=True)
            )
            and all(map(is_, [outside.value() for outside in self._outside], self._found))
            and all(content(value) == then for value, then in self._arrays)
            and all(
                name in own and comparable(own[name], {}, DEPTH) == then
                for own, name, then in self._compared
            )
        )


def _same(now: list[Any], then: list[Any]) -> bool:
    return len(now) == len(then) and all(map(is_, now, then))


def _contents(held: Any, skipped: Collection[str] = ()) -> list[Any]:
    if not isinstance(held, CONTAINERS):
        held = held_by(held) or {}
    if not isinstance(held, Mapping):
        return list(held)
    return [part for pair in held.items() if pair[0] not in skipped for part in pair]


def _holds_tensor(value: Any, known: dict[int, tuple[object, bool]], depth: int) -> bool:
    """Whether there is a tensor in a value, however it holds it."""
    if isinstance(value, Tensor):
        return True
    if isinstance(value, _ATOMS) or isroutine(value) or not depth:  # a function may well hold one
        return False
    if id(value) not in known:
        known[id(value)] = value, False  # it may lead back to itself
        inside: Iterable[Any] = ()
        if not isinstance(value, CONTAINERS):
            inside = (held_by(value) or {}).values()
        elif is_looked_into(value):
            inside = _contents(value)
        found = any(_holds_tensor(part, known, depth - 1) for part in inside)
        known[id(value)] = value, found
    return known[id(value)][1]
