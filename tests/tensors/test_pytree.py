"""Values come apart into tensors and go together again, whatever they are made of."""

from __future__ import annotations

import collections
import copy
import enum
import gc
import pickle
import weakref
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ckptsched.base.errors import ExecutionError
from ckptsched.tensors.pytree import State, storages


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass
class Open:
    tensor: Any
    number: int = 3


@dataclass(frozen=True, slots=True)
class Closed:
    tensor: Any
    derived: Any = field(init=False, default=None)


class Colour(enum.Enum):
    RED = 1


POOL = [torch.full((2,), float(i)) for i in range(4)] + [torch.arange(3)]
CONSTANTS = st.sampled_from(
    [None, 1, 2.5, "text", True, Colour.RED, torch.float32, torch.Size([2])]
)


def values() -> st.SearchStrategy[Any]:
    return st.recursive(
        st.sampled_from(POOL) | CONSTANTS,
        lambda part: st.one_of(
            st.lists(part, max_size=3),
            st.lists(part, max_size=3).map(tuple),
            st.dictionaries(st.sampled_from("abc"), part, max_size=3),
            st.dictionaries(st.sampled_from("abc"), part).map(collections.OrderedDict),
            st.builds(Pair, part, part),
            st.builds(Open, part, st.integers()),
            st.builds(Closed, part),
        ),
        max_leaves=8,
    )


def same(one: Any, other: Any) -> bool:
    """Equal in type and structure, with the very same tensors."""
    if isinstance(one, Tensor):
        return one is other
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Closed):
        return same(one.tensor, other.tensor) and same(one.derived, other.derived)
    if isinstance(one, Open):
        return same(vars(one), vars(other))
    return one == other


@settings(max_examples=150, deadline=None)
@given(values())
def test_what_is_taken_apart_goes_together_again(value: Any) -> None:
    state = State.of(value)
    assert same(state.value(), value)
    assert len({id(leaf) for leaf in state.leaves}) == len(state.leaves)
    # Any tensors fit in, and the structure is the same.
    other = state.replaced(leaf.clone() for leaf in state.leaves)
    assert State.of(other.value()).tree == state.tree
    assert all(map(torch.equal, State.of(other.value()).leaves, other.leaves))
    assert state.describe(lambda t: "T") == other.describe(lambda t: "T")


@settings(max_examples=50, deadline=None)
@given(values())
def test_what_is_taken_apart_can_be_pickled(value: Any) -> None:
    state = State.of(value)
    tree: State = pickle.loads(pickle.dumps(State((), state.tree)))
    assert same(tree.replaced(state.leaves).value(), value)


def test_a_tensor_that_occurs_twice_is_one_leaf() -> None:
    x = torch.ones(2)
    state = State.of({"a": x, "b": [x, x[:1]]})
    assert len(state.leaves) == 2
    assert len(storages(state.leaves)) == 1
    assert State.of((x, x)).tree != State.of((x, x.clone())).tree


def test_a_tensor_alone_is_the_plainest_state() -> None:
    x = torch.ones(2)
    assert State.of(x).is_tensor
    assert State.of(x).value() is x
    assert not State.of((x,)).is_tensor


def test_types_keep_what_else_they_have() -> None:
    default = collections.defaultdict(list, a=torch.ones(1))
    again = State.of(default).value()
    assert again["missing"] == []
    values = torch.ones(2, 3).max(dim=1)
    assert type(State.of(values).value()) is type(values)
    extra = Open(torch.ones(1))
    extra.more = torch.zeros(1)  # type: ignore[attr-defined]
    assert len(State.of(extra).leaves) == 2
    assert State.of(extra).value().more is extra.more  # type: ignore[attr-defined]


@pytest.mark.parametrize("make", [Open, Closed, lambda t: collections.OrderedDict(a=t)])
def test_a_tree_keeps_no_tensor_alive(make: Any) -> None:
    gc.collect()
    tensor = torch.ones(2)
    seen = weakref.ref(tensor)
    tree = State.of(make(tensor)).tree
    del tensor
    assert seen() is None
    assert tree == copy.copy(tree)


def test_objects_that_may_hide_tensors_are_refused() -> None:
    class Hiding:
        tensor = torch.ones(1)

    with pytest.raises(ExecutionError, match=r"a Hiding where a state was expected.*dataclasses"):
        State.of((1, Hiding()))
    hiding = Hiding()
    assert State.of((1, hiding), opaque=True).value() == (1, hiding)
    assert "<" in State.of((1, hiding), opaque=True).describe(lambda t: "T")


def test_structures_are_told_apart() -> None:
    x = torch.ones(1)
    trees = [
        State.of(value).tree
        for value in (x, (x,), [x], {"a": x}, {"b": x}, Pair(x, None), Pair(None, x), (x, 1), None)
    ]
    assert all((a == b) == (a is b) for a in trees for b in trees)
