"""The calls of a recording: what is called, with which values, and which values it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from inspect import ismodule, isroutine
from typing import Any, TypeAlias, cast, final

import torch
from torch import Tensor, nn

from ...tensors.pytree import Filling, State


@final
@dataclass(frozen=True, slots=True)
class Numbered:
    """A tensor that the call of the model was given, or that a call in it has made."""

    number: int

    def __str__(self) -> str:
        return f"v{self.number}"


@final
@dataclass(frozen=True, slots=True)
class Place:
    """Where the model keeps a tensor: it is looked up there each time."""

    path: str
    """Path of the module, as in the model's `state_dict`; empty for the model itself."""
    kind: str
    """The dictionary in the module that has it: "_parameters", "_buffers" or "" for attributes."""
    name: str
    steps: tuple[tuple[str, Any], ...] = ()
    """From what has the name to the tensor: ("item", key) in lists and dicts, ("attr", name)."""

    def __str__(self) -> str:
        inside = "".join(f"[{key!r}]" if how == "item" else f".{key}" for how, key in self.steps)
        return f"{self.path}.{self.name}{inside}" if self.path else f"{self.name}{inside}"

    def look_up(self, owner: nn.Module) -> Tensor:
        """The tensor that is there now.

        Args:
            owner: The module that keeps it.
        """
        held = getattr(owner, self.kind) if self.kind else vars(owner)
        found: Any = held[self.name]
        for how, key in self.steps:
            found = found[key] if how == "item" else getattr(found, key)
        return cast(Tensor, found)

    def holds_tensors(self, owner: nn.Module) -> bool:
        """Whether there are any now, also in a container.

        Args:
            owner: The module that keeps them.
        """
        with suppress(LookupError, AttributeError, TypeError):  # there is nothing of the kind
            return bool(tensors_of(self.look_up(owner)))
        return False

    def put(self, owner: nn.Module, value: Any) -> None:
        """Let the place hold another value.

        Args:
            owner: The module that keeps it.
            value: The other one.
        """
        held: Any = getattr(owner, self.kind) if self.kind else vars(owner)
        where: tuple[tuple[str, Any], ...] = (("item", self.name), *self.steps)
        for how, key in where[:-1]:
            held = held[key] if how == "item" else getattr(held, key)
        how, key = where[-1]
        if how == "item":
            held[key] = value
        else:
            setattr(held, key, value)


def is_plain_object(value: Any) -> bool:
    """Whether a value is an object with attributes, and no module, tensor, class or function."""
    kind = type(value)
    if isinstance(value, nn.Module | Tensor | type) or isroutine(value) or ismodule(value):
        return False
    return kind.__module__ != "builtins" and isinstance(getattr(value, "__dict__", None), dict)


_DEEPEST, _LONGEST = 3, 100  # of what is searched for tensors


def tensors_inside(value: Any, depth: int = _DEEPEST) -> Iterator[tuple[Any, Tensor]]:
    """The tensors in a list, tuple, dict or plain object, with the steps that lead to each.

    Args:
        value: Anything that a module keeps.
        depth: How deep to look.
    """
    parts: Iterable[tuple[tuple[str, Any], Any]] = ()
    if isinstance(value, list | tuple) and len(value) <= _LONGEST:
        parts = ((("item", k), part) for k, part in enumerate(value))
    elif isinstance(value, dict) and len(value) <= _LONGEST:
        parts = ((("item", key), part) for key, part in value.items())
    elif is_plain_object(value):
        parts = ((("attr", name), part) for name, part in vars(value).items())
    for step, part in parts:
        if isinstance(part, Tensor):
            yield (step,), part
        elif depth and not isinstance(part, str | int | float | bool | None):
            yield from (((step, *more), t) for more, t in tensors_inside(part, depth - 1))


@final
@dataclass(frozen=True, slots=True)
class Fixed:
    """A tensor from elsewhere, such as a global one: the same object each time."""

    tensor: Tensor

    def __str__(self) -> str:
        return f"tensor{list(self.tensor.shape)}"


Source: TypeAlias = Numbered | Place | Fixed
"""Where a call finds a tensor that it is given."""


@final
@dataclass(frozen=True, slots=True)
class Around:
    """What was around a call and not around the model: gradients off, another autocast."""

    no_grad: bool = False
    autocast: tuple[tuple[str, bool, torch.dtype], ...] | None = None
    """Device type, on or off, dtype; None where it was as around the model."""

    def entered(self) -> AbstractContextManager[Any]:
        """A context in which it is so again."""
        if not self.no_grad and self.autocast is None:
            return nullcontext()
        stack = ExitStack()
        if self.no_grad:
            stack.enter_context(torch.no_grad())
        for kind, enabled, dtype in self.autocast or ():
            # As in all stages, no weight that one run has cast is taken by another.
            again = torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)
            stack.enter_context(again)
        return stack


PLAIN = Around()


@final
class StagePath(str):
    """The name of a stage of a module that lists its stages, such as "flow.step[7]"."""

    path: str
    """That of the module."""
    position: int
    """Of the stage, in the module's list."""

    @classmethod
    def of(cls, path: str, index: int, label: str) -> StagePath:
        """Name a stage.

        Args:
            path: That of the module.
            index: Of the stage, in the module's list.
            label: Its name within the module; empty where it has none.
        """
        made = cls(f"{path}.{label or index}" if path else label or str(index))
        made.path, made.position = path, index
        return made


Kept: TypeAlias = tuple[State, tuple[Source, ...]]
"""What an attribute holds when a pass is over: a value without its tensors, and where they are."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class RecordedCall:
    """One call: a module, a function of torch, or a custom autograd Function."""

    target: Callable[..., Any] | str
    """What is called; a text is the path of a module, or names a stage of one."""
    given: State
    """The arguments, as `(args, kwargs)`, without their tensors."""
    reads: tuple[Source, ...]
    """Where the tensors of the arguments come from."""
    makes: tuple[int, ...]
    """Numbers of the tensors of its result; what it changes in place and gives back keeps its own.

    -1 for a tensor that lies in a place of the model's, and is found there.
    """
    scope: str
    """Path of the innermost module in whose forward it is written."""
    around: Around = PLAIN
    writes: tuple[int, ...] = ()
    """Numbers of the values that it changes in place."""
    why_whole: str = ""
    """For a module that is run whole where it need not be: why."""

    def __str__(self) -> str:
        """Such as "v3 = relu(v2)  in layers.0"."""
        made = ", ".join(f"v{n}" for n in self.makes if n >= 0) or "-"
        where = f"  in {self.scope}" if self.scope and not isinstance(self.target, str) else ""
        why = f"  whole: {self.why_whole}" if self.why_whole else ""
        return f"{made} = {self.name}({', '.join(map(str, self.reads))}){where}{why}"

    @property
    def name(self) -> str:
        """Such as "layers.0.linear", "relu", or "Tensor.view"."""
        return self.target if isinstance(self.target, str) else name_of(self.target)

    @property
    def values(self) -> tuple[int, ...]:
        """Numbers of the values that it reads."""
        return tuple(source.number for source in self.reads if isinstance(source, Numbered))

    @property
    def places(self) -> tuple[Place, ...]:
        """The tensors of the model that it is given, those of a module that it calls apart."""
        return tuple(source for source in self.reads if isinstance(source, Place))

    def run(
        self, callee: Callable[..., Any], filling: Filling, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Call it.

        Args:
            callee: The module that the target names, or the target.
            filling: Of `given`.
            tensors: For each of `reads` the tensor.

        Returns:
            The tensors of the result, in the order of `makes`.
        """
        args, kwargs = filling(tensors)
        if self.around is PLAIN:
            return tensors_of(callee(*args, **kwargs))
        with self.around.entered():
            return tensors_of(callee(*args, **kwargs))


def name_of(target: Callable[..., Any]) -> str:
    """What people call a function: "relu", "Tensor.view", the class of a custom Function."""
    owner = getattr(target, "__self__", None)
    name: str = getattr(target, "__name__", type(target).__name__)
    if name in ("__get__", "__set__"):
        return f"Tensor.{getattr(owner, '__name__', '?')}"
    kind = getattr(target, "__objclass__", None)
    return f"Tensor.{name}" if kind is not None else name


def tensors_of(value: Any) -> tuple[Tensor, ...]:
    """The distinct tensors in a value, in order; none of what is no container is looked into."""
    if isinstance(value, Tensor):
        return (value,)
    return State.of(value, opaque=True).leaves


@final
@dataclass(frozen=True, slots=True, eq=False)
class Guard:
    """A decision that the model took by the values of a tensor: others need another recording."""

    read: RecordedCall
    """What read the tensor, such as `Tensor.item`."""
    found: Any
    """What it gave."""
    after: int
    """How many calls of the recording had been made before it."""
