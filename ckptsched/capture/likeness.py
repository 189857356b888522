"""What decides the bytes and the seconds of a stage besides its input, as a value to compare.

Stages of equal likeness do the same with tensors of the same layout, if other ones: layers of a
stack. Modules and tensors count by the order in which they come up. What an attribute of a module
may decide counts by its value, or by its identity where that cannot be told: stages are taken to be
unlike wherever there is a doubt.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable, Iterable, Mapping, Sequence
from inspect import isroutine
from types import FunctionType
from typing import Any, final

import torch
from torch import Tensor, nn

from ..recompute.fsdp import has_hooks
from ..tensors.pytree import State
from ..tensors.wrapper_tensors import is_plain
from .recording.calls import Numbered, Place, RecordedCall, StagePath
from .wrappers import is_compiled

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_PLAIN = (
    *(type(None), bool, int, complex, str, bytes, range, type(...), enum.Enum, type),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
_DEPTH = 6  # of containers; what lies deeper counts by identity
_LEAF = torch.empty(0, device="cpu")


class InDoubtError(Exception):
    """What a stage does cannot be told from what can be seen of it."""


@final
class _Itself:
    """An object that is equal to itself alone; it is kept, so that no other one takes its id."""

    __slots__ = ("_held",)

    def __init__(self, held: object) -> None:
        self._held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other._held is self._held

    def __hash__(self) -> int:
        return id(self._held)


@final
class Likeness:
    """Describes the parts of one stage; what comes up again is known by its number."""

    def __init__(self) -> None:
        """Nothing has come up yet."""
        self._numbers: dict[int, int] = {}
        self._seen: list[object] = []

    def _number(self, thing: object) -> int:
        """The number of an object, a new one where it has none."""
        number = self._numbers.get(id(thing))
        if number is None:
            number = self._numbers[id(thing)] = len(self._seen)
            self._seen.append(thing)
        return number

    def tensor(self, tensor: Tensor) -> Hashable:
        """Which tensor it is, its layout, and whether it requires a gradient.

        Args:
            tensor: One that lives longer than the stage.

        Raises:
            InDoubtError: It is no plain one.
        """
        if not is_plain(tensor) or tensor.layout is not torch.strided:
            raise InDoubtError
        storage = tensor.untyped_storage()
        return (
            self._number(tensor),
            self._numbers.setdefault(-storage._cdata, len(self._numbers)),
            (type(tensor), tensor.dtype, tensor.device, tensor.requires_grad),
            (tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), storage.nbytes()),
        )

    def owned(self, modules: Iterable[nn.Module]) -> Hashable:
        """The parameters and buffers of modules.

        Args:
            modules: All of them, without what is below them.

        Raises:
            InDoubtError: Some tensor is no plain one.
        """
        return tuple(
            [
                (kind, name, None if tensor is None else self.tensor(tensor))
                for module in modules
                for kind in ("_parameters", "_buffers")
                for name, tensor in getattr(module, kind).items()
            ]
        )

    def module(self, module: nn.Module) -> Hashable:
        """A module that runs as a whole: classes, modes, settings and tensors of all of its parts.

        Args:
            module: The module.

        Raises:
            InDoubtError: A part has hooks, is compiled, or keeps something out of sight.
        """
        parts = list(module.modules())
        numbers = [self._number(part) for part in parts]
        owned = self.owned(parts)
        return tuple(numbers), owned, tuple(map(self._part, parts))

    def _part(self, module: nn.Module) -> Hashable:
        kind = type(module)
        hidden = any(vars(k).get("__slots__") for k in kind.__mro__ if k is not nn.Module)
        scripted = isinstance(module, torch.jit.ScriptModule)
        if hidden or scripted or has_hooks(module) or is_compiled(module):
            raise InDoubtError
        below = [
            (name, None if part is None else self._number(part))
            for name, part in module._modules.items()
        ]
        own = [
            (name, self.value(value))
            for name, value in vars(module).items()
            if name not in _OF_EVERY_MODULE
        ]
        return kind, module.training, tuple(below), tuple(own)

    def value(self, value: Any, depth: int = _DEPTH) -> Hashable:
        """What a module keeps, or a call is given, besides tensors.

        Args:
            value: Anything.
            depth: How deep to look into containers.
        """
        kind = type(value)
        if isinstance(value, _PLAIN):
            return kind, value
        if isinstance(value, float):
            return kind, value.hex()  # 0.0 is not -0.0, and a nan is like itself
        if id(value) in self._numbers:
            return "known", self._numbers[id(value)]
        if isroutine(value):
            return _function(value)
        if isinstance(value, slice):
            value = (value.start, value.stop, value.step)
        if depth and isinstance(value, list | tuple):
            return kind, tuple([self.value(part, depth - 1) for part in value])
        if depth and isinstance(value, Mapping):
            return kind, tuple(
                [(self.value(k, 0), self.value(part, depth - 1)) for k, part in value.items()]
            )
        return _Itself(value)

    def calls(
        self, calls: Sequence[RecordedCall], tensors: Any, modules: Any, enters: Iterable[int]
    ) -> tuple[Hashable, dict[int, int]]:
        """Calls of a recording, in order.

        Args:
            calls: Some that follow each other.
            tensors: Gives the tensor that a source names which is no number.
            modules: Gives the module of a path.
            enters: Numbers of the values that there are before.

        Returns:
            Their likeness, and for each of the recording's numbers the one that it has here.

        Raises:
            InDoubtError: A call is one of a module that cannot be told.
        """
        local: dict[int, int] = {}

        def here(number: int) -> int:
            return -1 if number < 0 else local.setdefault(number, len(local))

        found: list[Hashable] = [tuple(map(here, enters))]
        for call in calls:
            reads = tuple(
                [
                    here(source.number)
                    if isinstance(source, Numbered)
                    else (type(source), self.tensor(tensors(source)))
                    for source in call.reads
                ]
            )
            found.append(
                (
                    self.call(call, modules),
                    reads,
                    tuple(map(here, call.makes)),
                    tuple(map(here, call.writes)),
                )
            )
        return tuple(found), local

    def call(self, call: RecordedCall, modules: Any) -> Hashable:
        """What is called, and with what besides tensors.

        Args:
            call: The call.
            modules: Gives the module of a path, or the stage that is named.

        Raises:
            InDoubtError: It is one of a module that cannot be told.
        """
        target = call.target
        called: Hashable = target
        if isinstance(target, StagePath):
            called = modules(target).key
        elif isinstance(target, str):
            called = self.module(modules(target))
        given = State((_LEAF,) * len(call.reads), call.given.tree)
        constants = tuple(map(self.value, given.constants()))
        places = [source.kind for source in call.reads if isinstance(source, Place)]
        return called, given.describe(lambda _: "tensor"), constants, tuple(places), call.around


def _function(value: Any) -> Hashable:
    """A function: equal ones do the same, wherever they were made."""
    if isinstance(value, FunctionType) and not value.__closure__ and not vars(value):
        defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        if all(isinstance(default, _PLAIN) for default in defaults):
            told = tuple([(type(default), default) for default in defaults])
            return value.__code__, told, _Itself(value.__globals__)
    return _Itself(getattr(value, "__func__", value)), _Itself(getattr(value, "__self__", None))
