"""Saved-tensor hooks: which are in force, and contexts with others or none.

Of the hooks that are in force at a time the innermost pair alone counts. torch tells of it by names
that are not public; where they are not there, nothing is known of hooks, and they stay as they are.
"""

from __future__ import annotations

import gc
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import starmap
from typing import Any, TypeAlias

import torch
from torch.autograd.graph import saved_tensors_hooks

from ..base.json_files import printable

Hooks: TypeAlias = tuple[Callable[..., Any], Callable[..., Any]]
"""What packs a tensor that autograd saves, and what unpacks it."""

UNDER = "under"
"""Attribute of what owns a hook of ckptsched's own: the hooks that it stands for, or None."""

_home: Any = getattr(torch._C, "_autograd", None)
_ARE_SEEN = all(
    hasattr(_home, f"_{verb}_saved_tensors_default_hooks") for verb in ("top", "pop", "push")
)
_OURS = __name__.partition(".")[0] + "."


def innermost_hooks() -> Hooks | None:
    """The hooks in force, whoever has set them; None where there are none, or torch hides them."""
    found: Hooks | None = _home._top_saved_tensors_default_hooks(True) if _ARE_SEEN else None
    return found


def hooks_now() -> Hooks | None:
    """The same without those of ckptsched, which stand for others at most."""
    found = innermost_hooks()
    while found is not None and str(getattr(found[0], "__module__", "")).startswith(_OURS):
        found = getattr(getattr(found[0], "__self__", None), UNDER, None)
    return found


def describe_hooks(hooks: Hooks | None) -> str:
    """Name of the pack hook, such as "save_on_cpu.pack_to_cpu"; empty where there are no hooks."""
    if hooks is None:
        return ""
    name = getattr(hooks[0], "__qualname__", type(hooks[0]).__qualname__)
    return printable(str(name).replace("__init__.<locals>.", "").replace("<locals>.", ""))


@contextmanager
def no_hooks() -> Iterator[None]:
    """A context without saved-tensor hooks."""
    taken: list[Hooks] = []
    while (hooks := innermost_hooks()) is not None:
        taken.append(hooks)
        _home._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(taken):
            _home._push_saved_tensors_default_hooks(pack, unpack)


def only_hooks(hooks: Hooks | None) -> AbstractContextManager[object]:
    """A context in which only these saved-tensor hooks are in force, or none."""
    return no_hooks() if hooks is None else saved_tensors_hooks(*hooks)


class _OthersHook(Exception):
    """A hook that is not ckptsched's was about to unpack."""


def _stop_others(frame: Any, event: str, argument: object) -> None:
    if event == "call" and not str(frame.f_globals.get("__name__", "")).startswith(_OURS):
        raise _OthersHook


def unpacked(node: object, names: Sequence[str]) -> list[Any]:
    """Read attributes of an autograd node that unpack what it has saved, and call no hook for it.

    A hook may compute, and may count on being called once in a backward: that of torch's checkpoint
    runs its region again. Nothing of torch tells of a hook before it is called, so Python's
    profiler stops it as it is entered, before its first line.

    Returns the values, without those that hooks of others have packed, or that torch does not give.
    None at all where another profiler is at work that would not be found again.
    """
    before = sys.getprofile()
    if before is not None and not callable(before):  # one in C, as cProfile on Python 3.11
        return []
    was_on, found = gc.isenabled(), list[Any]()
    gc.disable()  # what is collected may have a finalizer, which is no hook
    try:
        for name in names:
            # In one call of C, which lets nothing in between its steps, such as signal handlers.
            steps = (sys.setprofile, _stop_others), (getattr, node, name), (sys.setprofile, before)
            try:
                found.append(list(starmap(operator.call, steps))[1])
            except (_OthersHook, RuntimeError, AttributeError):  # such as: let go already
                sys.setprofile(before)
    finally:
        sys.setprofile(before)
        if was_on:
            gc.enable()
    return found
