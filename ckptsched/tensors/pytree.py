"""Values made of several tensors: tuples, lists, dictionaries and dataclasses, at any depth.

What stages pass on is taken apart into its tensors and a tree that holds everything else, and
put together again for the next stage. torch has the same inside, but not for others to use.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import operator
from collections import Counter, UserDict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import EllipsisType, MappingProxyType, NoneType
from typing import Any, TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from ..base.errors import ExecutionError
from .wrapper_tensors import all_parts, dense_parts, rebuilt

# What holds no tensor, and so may pass through as it is.
_PLAIN = (
    *(NoneType, bool, int, float, complex, str, bytes, range, slice, EllipsisType, enum.Enum, type),
    *(torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format),
)


@final
@dataclass(frozen=True, slots=True)
class _Leaf:
    """The place of a tensor in a value."""

    index: int


@final
@dataclass(frozen=True, slots=True)
class _Branch:
    """A container, without what it contained."""

    kind: str
    """Name of its type."""
    keys: tuple[Any, ...]
    """Names of its parts; none for a sequence."""
    parts: tuple[_Node, ...]
    build: Callable[[list[Any]], Any] = dataclasses.field(compare=False)
    """Makes the container again from new parts."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Constant:
    """A value that is no tensor and contains none."""

    value: Any

    def __eq__(self, other: object) -> bool:
        """Whether the values are equal; for arrays, all elements of them."""
        if not isinstance(other, _Constant):
            return NotImplemented
        one, two = self.value, other.value
        return one is two or equal_constants(one, two)

    def __hash__(self) -> int:
        """That of the value."""
        return hash(self.value)


_Node: TypeAlias = _Leaf | _Branch | _Constant
_LEAF = _Leaf(0)


@final
class State:
    """A value between two stages: its distinct tensors, and how they make up the value.

    A tensor that occurs twice is one leaf, so that its gradient is one sum, as in one graph. A
    plain class, as every run of a stage makes a few.
    """

    __slots__ = ("leaves", "tree")

    def __init__(self, leaves: tuple[Tensor, ...], tree: _Node = _LEAF) -> None:
        self.leaves = leaves
        self.tree = tree

    @classmethod
    def of(cls, value: Any, *, opaque: bool = False) -> State:
        """Take apart a tensor, or tuples, lists, dictionaries and dataclasses of them.

        Objects of other types, in which tensors are not seen, may pass if `opaque`; else they are
        refused by an ExecutionError, as is a container that holds itself.
        """
        if isinstance(value, Tensor):
            return cls((value,))
        leaves: dict[int, tuple[int, Tensor]] = {}
        try:
            tree = _take_apart(value, leaves, opaque)
        except RecursionError:
            raise ExecutionError(
                "a container that holds itself, or others at an endless depth, was given where "
                "tensors are looked for; give tuples, lists, dicts and dataclasses that end"
            ) from None
        return cls(tuple(tensor for _, tensor in leaves.values()), tree)

    def value(self) -> Any:
        """The value itself."""
        if self.tree is _LEAF:
            return self.leaves[0]
        return _put_together(self.tree, self.leaves)

    def replaced(self, leaves: Iterable[Tensor]) -> State:
        """The same structure with other tensors."""
        return State(tuple(leaves), self.tree)

    def detached(self) -> State:
        """The same tensors without their graphs."""
        if len(self.leaves) == 1:
            return State((self.leaves[0].detach(),), self.tree)
        return State(tuple([leaf.detach() for leaf in self.leaves]), self.tree)

    def without_graph(self) -> State:
        """The same tensors; without their graphs where they have any."""
        for leaf in self.leaves:
            if leaf.requires_grad:
                return self.detached()
        return self

    def versions(self) -> tuple[int, ...]:
        """How often each tensor has been changed in place."""
        return tuple([leaf._version for leaf in self.leaves])

    def with_own_arrays(self) -> State:
        """The same with copies of the arrays of numpy among its constants, which others change."""
        return State(self.leaves, _with_own_arrays(self.tree))

    def constants(self) -> Iterator[Any]:
        """The values besides tensors, in order."""
        return (end.value for end in _ends(self.tree) if isinstance(end, _Constant))

    @property
    def is_tensor(self) -> bool:
        """Whether the value is one tensor and nothing else."""
        return self.tree == _LEAF

    def describe(self, leaf: Callable[[Tensor], str]) -> str:
        """The structure as text, such as "tuple(float32[2, 3], dict('mask': None))".

        `leaf` prints a tensor; one that occurs twice gets a number besides.
        """
        counts = Counter(end.index for end in _ends(self.tree) if isinstance(end, _Leaf))
        texts = [leaf(tensor) for tensor in self.leaves]
        numbered = [f"#{k} {text}" if counts[k] > 1 else text for k, text in enumerate(texts)]
        return _describe(self.tree, numbered)


@final
class Filling:
    """Puts tensors into the arguments of a call, `(args, kwargs)` taken apart, again and again."""

    __slots__ = ("_args", "_args_nested", "_args_plain", "_kwargs", "_kwargs_nested")

    def __init__(self, call: State) -> None:
        assert isinstance(call.tree, _Branch)
        args, kwargs = call.tree.parts
        assert isinstance(args, _Branch)
        assert isinstance(kwargs, _Branch)
        self._args, rest = _filled(enumerate(args.parts))
        self._args_plain = [(k, node.index) for k, node in rest if isinstance(node, _Leaf)]
        self._args_nested = [(k, node) for k, node in rest if not isinstance(node, _Leaf)]
        found, self._kwargs_nested = _filled(zip(kwargs.keys, kwargs.parts, strict=True))
        self._kwargs: dict[str, Any] = dict(zip(kwargs.keys, found, strict=True))

    def __call__(self, leaves: Sequence[Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments by position and by name, with these tensors."""
        args, kwargs = self._args.copy(), self._kwargs.copy()
        for k, index in self._args_plain:
            args[k] = leaves[index]
        for k, node in self._args_nested:
            args[k] = _put_together(node, leaves)
        for key, part in self._kwargs_nested:
            kwargs[key] = _put_together(part, leaves)
        return args, kwargs


def _filled(nodes: Iterable[tuple[Any, _Node]]) -> tuple[list[Any], list[tuple[Any, _Node]]]:
    """Constants in their places, and what else is to be put where."""
    pairs = list(nodes)
    values = [node.value if isinstance(node, _Constant) else None for _, node in pairs]
    return values, [(key, node) for key, node in pairs if not isinstance(node, _Constant)]


@final
@dataclass(frozen=True)
class Extras:
    """Further arguments that every stage is given, such as a mask or a condition."""

    args: tuple[Any, ...] = ()
    """By position, after the state."""
    kwargs: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """By name."""

    def apart(self) -> State:
        """The arguments, taken apart; objects of any type may pass."""
        return State.of((self.args, dict(self.kwargs)), opaque=True)

    @classmethod
    def of(cls, state: State) -> Extras:
        """The arguments, put together again."""
        args, kwargs = state.value()
        return cls(args, kwargs)

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self.args or self.kwargs)


NO_EXTRAS = Extras()


def storages(leaves: Iterable[Tensor]) -> dict[int, list[Tensor]]:
    """Tensors by the storage that they lie in, in order of first appearance.

    Of tensors that wrap others these are those that lie in storages.
    """
    found: dict[int, list[Tensor]] = {}
    for leaf in all_parts(leaves):
        found.setdefault(leaf.untyped_storage()._cdata, []).append(leaf)
    return found


def copied(state: State, fixed: Container[int] = ()) -> State:
    """A copy with the same layout, gaps included, in storages of its own, but for fixed ones."""
    fresh: dict[int, Tensor] = {}
    return state.replaced(
        rebuilt(leaf, iter([_copy_of(part, fixed, fresh) for part in dense_parts(leaf)]))
        for leaf in state.leaves
    )


def _copy_of(tensor: Tensor, fixed: Container[int], fresh: dict[int, Tensor]) -> Tensor:
    """A copy of a dense tensor in a copy of its storage, each made once."""
    storage = tensor.untyped_storage()
    if storage._cdata in fixed:
        return tensor.detach()
    if storage._cdata not in fresh:
        whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        fresh[storage._cdata] = whole.clone()
    made = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    home = fresh[storage._cdata].untyped_storage()
    made = made.set_(home, tensor.storage_offset(), tensor.shape, tensor.stride())
    made = made.conj() if tensor.is_conj() else made
    negated = getattr(made, "_neg_view", None) if tensor.is_neg() else None
    return made if negated is None else negated()


def equal_constants(one: Any, two: Any) -> bool:
    """Whether two values that are no tensors are equal; what cannot be compared is not.

    Args:
        one: Any value.
        two: Another.
    """
    if isinstance(one, np.ndarray) or isinstance(two, np.ndarray):
        same = type(one) is type(two) and one.dtype == two.dtype and one.shape == two.shape
        return same and one.tobytes() == two.tobytes()
    try:
        return bool(one == two)
    except Exception:  # others compare as they like
        return False


def _take_apart(value: Any, leaves: dict[int, tuple[int, Tensor]], opaque: bool) -> _Node:
    if isinstance(value, Tensor):
        return _Leaf(leaves.setdefault(id(value), (len(leaves), value))[0])
    if isinstance(value, _PLAIN):
        return _Constant(value)
    found = _container(value)
    if found is None:
        if opaque:
            return _Constant(value)
        raise ExecutionError(
            f"a {type(value).__name__} where a state was expected: ckptsched looks for tensors in "
            "tuples, lists, dicts, named tuples and dataclasses, and cannot see what else this may "
            "hold; let stages pass on tensors and such containers of them, numbers and text"
        )
    keys, items, build = found
    parts = tuple(_take_apart(item, leaves, opaque) for item in items)
    return _Branch(type(value).__qualname__, keys, parts, build)


_Container: TypeAlias = tuple[tuple[Any, ...], Sequence[Any], Callable[[list[Any]], Any]]


def _container(value: Any) -> _Container | None:
    """Keys, items and how to build it again; None for what is no container."""
    kind = type(value)
    if kind is tuple or kind is list:
        return (), value, kind
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return kind._fields, value, functools.partial(_named, kind)
    if isinstance(value, tuple) and hasattr(kind, "n_sequence_fields"):
        return (), value, kind  # what torch.max and the like return
    if isinstance(value, dict):
        keys = tuple(value)
        if kind is dict:
            return keys, list(value.values()), functools.partial(_dict, keys)
        return keys, list(value.values()), _builder(value, keys, operator.setitem)
    if isinstance(value, UserDict):  # as the batches of transformers are
        keys = tuple(value.data)
        return keys, list(value.data.values()), _builder(value, keys, _set_data)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = dict.fromkeys(field.name for field in dataclasses.fields(value))
        names |= dict.fromkeys(getattr(value, "__dict__", ()))
        present = tuple(name for name in names if hasattr(value, name))
        return (
            present,
            [getattr(value, name) for name in present],
            _builder(value, present, object.__setattr__),
        )
    return None


def _set_data(container: Any, key: Any, part: Any) -> None:
    container.data[key] = part


def _builder(
    value: Any, keys: tuple[Any, ...], put: Callable[[Any, Any, Any], None]
) -> Callable[[list[Any]], Any]:
    """Build by filling a copy, so that nothing runs that the type does when it is made."""
    empty = copy.copy(value)
    for key in keys:
        put(empty, key, None)  # the tree must keep no tensor alive
    return functools.partial(_refilled, empty, keys, put)


# How containers are built again: functions of their own, so that a tree can be pickled.


def _named(kind: Callable[..., Any], parts: list[Any]) -> Any:
    return kind(*parts)


def _dict(keys: tuple[Any, ...], parts: list[Any]) -> Any:
    return dict(zip(keys, parts, strict=True))


def _refilled(
    empty: Any, keys: tuple[Any, ...], put: Callable[[Any, Any, Any], None], parts: list[Any]
) -> Any:
    made = copy.copy(empty)
    for key, part in zip(keys, parts, strict=True):
        put(made, key, part)
    return made


def _put_together(node: _Node, leaves: Sequence[Tensor]) -> Any:
    if isinstance(node, _Leaf):
        return leaves[node.index]
    if isinstance(node, _Constant):
        return node.value
    return node.build([_put_together(part, leaves) for part in node.parts])


def _ends(node: _Node) -> Iterator[_Leaf | _Constant]:
    """Tensors' places and other values, in order."""
    if isinstance(node, _Branch):
        for part in node.parts:
            yield from _ends(part)
    else:
        yield node


def _with_own_arrays(node: _Node) -> _Node:
    if isinstance(node, _Constant) and isinstance(node.value, np.ndarray):
        return _Constant(node.value.copy())
    if isinstance(node, _Branch):
        return dataclasses.replace(node, parts=tuple(map(_with_own_arrays, node.parts)))
    return node


def _describe(node: _Node, leaves: Sequence[str]) -> str:
    if isinstance(node, _Leaf):
        return leaves[node.index]
    if isinstance(node, _Constant):
        plain = isinstance(node.value, _PLAIN)
        return repr(node.value) if plain else f"<{type(node.value).__qualname__}>"
    parts = [_describe(part, leaves) for part in node.parts]
    if node.keys:
        parts = [f"{key!r}: {part}" for key, part in zip(node.keys, parts, strict=True)]
    return f"{node.kind}({', '.join(parts)})"
