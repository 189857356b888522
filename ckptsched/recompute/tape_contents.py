"""Finds by a walk of an autograd graph the leaves that it uses and the storages that it keeps.

A walk sees what operations and `torch.autograd.Function`s save. What the nodes of extensions in
C++ keep for themselves, and what a hook has packed into objects of its own, it does not see: what
a walk finds is compared with what another walk of such a tape has found, not with measured bytes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ..tensors.wrapper_tensors import cannot_be_followed, dense_parts
from ..torch_state.saved_hooks import unpacked

_PYTHON_NODE: type = getattr(torch._C, "_FunctionBase", type(None))
NOTHING = object()
"""In place of a leaf that does not count."""

_RAW = "_raw_saved_"  # such attributes show what is saved, and do not unpack it as "_saved_" do
# Those of torch 2.9 do not show it: there it is unpacked, where no hook of others has packed it.
SHOWS_WHAT_IS_SAVED = hasattr(getattr(torch._C._autograd, "SavedTensor", None), "data")
_names: dict[type, tuple[str, ...]] = {}


@final
@dataclass(slots=True)
class Contents:
    """Leaves and storages of a tape, or of the part of it that one stage has made."""

    leaves: dict[int, tuple[object, int]] = field(default_factory=dict)
    """Each leaf that it uses, and how often; by the leaf's id."""
    saved: dict[int, int] = field(default_factory=dict)
    """Bytes of the storages that it keeps, by identity; those of leaves among them."""
    nodes: int = 0
    """How many nodes it has."""


def walk(
    roots: Iterable[Node], leaf_of: Callable[[Node], object], marks: Sequence[int] = (0,)
) -> list[Contents]:
    """Go through a graph, each node once.

    Args:
        roots: Where it ends.
        leaf_of: What a node collects a gradient for: None for those in the middle of the graph,
            `NOTHING` for what does not count.
        marks: Where several stages have made it, how many nodes the thread had made before each
            of them, ascending; one stage if not given.

    Returns:
        What each stage's part holds.
    """
    found = [Contents() for _ in marks]
    seen: set[Node] = set()
    ahead = [(node, len(marks) - 1) for node in roots]
    while ahead:
        node, part = ahead.pop()
        leaf = leaf_of(node)
        if leaf is NOTHING:
            continue
        if leaf is not None:
            uses = found[part].leaves
            uses[id(leaf)] = leaf, uses.get(id(leaf), (leaf, 0))[1] + 1
        elif node not in seen:
            seen.add(node)
            part = max(0, bisect_right(marks, node._sequence_nr()) - 1) if part else 0
            found[part].nodes += 1
            _note_saved(node, found[part].saved)
            ahead += [(before, part) for before, _ in node.next_functions if before is not None]
    return found


def _note_saved(node: Node, saved: dict[int, int]) -> None:
    for tensor in _tensors(node):
        if cannot_be_followed(tensor, without_data=True):
            continue  # asking for a storage that there is none of may end the process
        for part in dense_parts(tensor):
            storage = part.untyped_storage()
            saved[storage._cdata] = storage.nbytes()


def _tensors(node: Node) -> Iterator[Tensor]:
    """The tensors that a node keeps, as far as it shows them."""
    is_python = isinstance(node, _PYTHON_NODE)
    names = (f"{_RAW}tensors",) if is_python else _raw_names(type(node))
    if not SHOWS_WHAT_IS_SAVED:
        names = tuple([name.removeprefix("_raw_" if is_python else "_raw") for name in names])
    for value in _raw_data(node, names) if SHOWS_WHAT_IS_SAVED else unpacked(node, names):
        yield from _inside(value)
    if is_python:  # attributes of what torch calls ctx
        for value in list(vars(node).values()):
            yield from _inside(value)


def _raw_data(node: Node, names: Iterable[str]) -> Iterator[Any]:
    for name in names:
        try:
            value = getattr(node, name, ())
        except RuntimeError:  # let go already
            continue
        for raw in value if isinstance(value, (tuple, list)) else (value,):
            yield getattr(raw, "data", None)


def _raw_names(kind: type) -> tuple[str, ...]:
    found = _names.get(kind)
    if found is None:
        found = _names[kind] = tuple([name for name in dir(kind) if name.startswith(_RAW)])
    return found


def _inside(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _inside(part)
