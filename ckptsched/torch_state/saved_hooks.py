"""Hooks on what autograd saves for a backward: who packs it, and how to be without.

Of the hooks that are in force at a time the innermost pair alone counts. torch tells of it by names
that are not public; where they are not there, nothing is known of hooks, and they stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
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
    """What packs, such as "save_on_cpu.pack_to_cpu"; empty where there are no hooks."""
    if hooks is None:
        return ""
    name = getattr(hooks[0], "__qualname__", type(hooks[0]).__qualname__)
    return printable(str(name).replace("__init__.<locals>.", "").replace("<locals>.", ""))


@contextmanager
def no_hooks() -> Iterator[None]:
    """Let autograd save as it is."""
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
    """Let these alone pack what autograd saves, or nothing."""
    return no_hooks() if hooks is None else saved_tensors_hooks(*hooks)
