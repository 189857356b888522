"""Arguments by the names that a forward has for them: calls that say the same are one kind.

Whether an argument is given by position or by name, or left at its default, makes no other call.
A recording was made of one way to call; calls in other ways are put into that one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, final

from torch import Tensor

from ..capture.recording.recording import Layout, layouts_of
from ..tensors.pytree import State

_NAMED = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
_COMPARED = (bool, int, float, str)  # defaults that are equal where they are not the same object

Arguments: TypeAlias = tuple[tuple[Any, ...], Mapping[str, Any]]
"""What a model is called with, by position and by name."""


class Kind(NamedTuple):
    """What is the same of calls that may follow one plan."""

    names: tuple[str, ...]
    """Of the arguments that are given and are not as they would be otherwise."""
    layouts: tuple[Layout, ...]
    """Of the distinct tensors in them."""


@final
@dataclass(frozen=True, slots=True)
class Form:
    """Which arguments a call gives by position, and which by name, in order."""

    by_position: tuple[str, ...]
    by_name: tuple[str, ...]


@final
@dataclass(frozen=True, slots=True)
class Call:
    """What a model is called with."""

    given: Arguments
    """As they came."""
    form: Form | None
    """The way in which they came; None where it is taken as it is."""
    values: Mapping[str, Any]
    """By name, in the order of the forward, without those that are at their defaults."""
    defaults: Mapping[str, Any]

    def kind(self) -> Kind:
        """What is the same of calls that may follow one plan."""
        if self.form is None:
            return Kind((), layouts_of(State.of(self.given, opaque=True)))
        return Kind(tuple(self.values), layouts_of(State.of(dict(self.values), opaque=True)))

    def put_into(self, form: Form | None) -> Arguments | None:
        """The same call in another form; None where that has no place for an argument.

        Args:
            form: The form.
        """
        if form == self.form or form is None or self.form is None:
            return self.given if form == self.form else None
        values = {**self.defaults, **self.values}
        names = (*form.by_position, *form.by_name)
        if not self.values.keys() <= set(names) <= values.keys():
            return None
        args = tuple([values[name] for name in form.by_position])
        return args, {name: values[name] for name in form.by_name}


@final
class ArgumentNames:
    """The names and defaults of the arguments of a forward."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        """Ask for its signature.

        Args:
            forward: A forward; of one without a signature, calls are taken as they are.
        """
        try:
            parameters: Mapping[str, inspect.Parameter] = inspect.signature(forward).parameters
        except (TypeError, ValueError):
            parameters = {}
        self._itself = _signature_itself(forward)
        named = {name: p for name, p in parameters.items() if p.kind in _NAMED}
        self._order = tuple(named)
        positional = [n for n, p in named.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        # Where some have no name to be given by, those after them cannot be told by position.
        alone = any(p.kind is p.POSITIONAL_ONLY for p in parameters.values())
        self._positional: tuple[str, ...] = () if alone else tuple(positional)
        self._defaults = {n: p.default for n, p in named.items() if p.default is not p.empty}

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """A call, by the names of its arguments.

        Args:
            args: By position.
            kwargs: By name.
        """
        by_position, kwargs = self._positional[: len(args)], dict(kwargs)
        if len(by_position) < len(args) or not kwargs.keys().isdisjoint(by_position):
            return Call((args, kwargs), None, {}, {})
        given = {**dict(zip(by_position, args, strict=True)), **kwargs}
        names = [
            *(n for n in self._order if n in given),
            *(n for n in given if n not in self._order),
        ]
        values = {name: given[name] for name in names if not self._is_default(name, given[name])}
        return Call((args, kwargs), Form(by_position, tuple(kwargs)), values, self._defaults)

    def takes(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether Python lets the forward be called so: where not, a call runs nothing of it.

        Args:
            args: By position.
            kwargs: By name.
        """
        try:
            if self._itself is not None:
                self._itself.bind(*args, **kwargs)
        except TypeError:
            return False
        return True

    def _is_default(self, name: str, value: Any) -> bool:
        if name not in self._defaults:
            return False
        default = self._defaults[name]
        same = type(value) is type(default) and isinstance(value, _COMPARED)
        return value is default or (same and bool(value == default))


def _signature_itself(forward: Callable[..., Any]) -> inspect.Signature | None:
    """What Python itself checks a call by; None where that is not known.

    A decorated forward tells the signature of what it wraps, and may take more than that: it is
    asked for its own. One that was told what to say, by `__signature__`, is not believed.
    """
    if hasattr(forward, "__signature__"):
        return None
    try:
        return inspect.signature(forward, follow_wrapped=False)
    except (TypeError, ValueError):
        return None


@final
@dataclass(frozen=True, slots=True)
class Extent:
    """Structure and layouts of a call, whichever of its arguments are one tensor."""

    structure: State
    layouts: tuple[Layout, ...]

    @classmethod
    def of(cls, arguments: Arguments) -> Extent:
        """That of a call.

        Args:
            arguments: What a model is called with.
        """
        args, kwargs = arguments
        seen = set[int]()
        apart = State.of(
            (tuple(_apart(x, seen) for x in args), {n: _apart(x, seen) for n, x in kwargs.items()}),
            opaque=True,
        )
        return cls(State((), apart.tree), layouts_of(apart))

    def covers(self, other: Extent) -> bool:
        """Whether another has the same structure, and no tensor that is larger in any way.

        Args:
            other: The other one.
        """
        if self.structure.tree != other.structure.tree or len(self.layouts) != len(other.layouts):
            return False
        return all(
            one[1:] == two[1:]
            and len(one[0]) == len(two[0])
            and all(a >= b for a, b in zip(one[0], two[0], strict=True))
            for one, two in zip(self.layouts, other.layouts, strict=True)
        )


def _apart(value: Any, seen: set[int]) -> Any:
    """An argument, or another tensor like it where it is one that came before."""
    if not isinstance(value, Tensor) or value.requires_grad:
        return value
    if id(value) in seen:
        return value.detach()
    seen.add(id(value))
    return value
