"""Marks values in a model's forward that no run of a step computes a second time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...base.errors import ExecutionError

T = TypeVar("T", bound=Tensor)

# Who records a model, by thread: it is told of what is kept.
_LISTENERS: dict[int, Callable[[Tensor], Any]] = {}


def keep(tensor: T) -> T:
    """Have a value computed once in a training step; written into a model's forward.

    Where the model is recorded (`fit`, `plan`, `profile`, `captured`), the calls that have made
    the value, and those that have written to its memory so far, are as those of
    `never_recompute`: no lean tape makes them again, and a plan runs the stage that has them once
    and keeps its tape until its backward. A tape holds on to what its stage reads, so that a kept
    value may cost more bytes than its own; cuts are laid right before and after those calls, so
    that the stage is as small as it can be.

    What it does not promise: the value is kept as long as a backward needs it, and not at all if
    none does. Calls before those that made it are run again as the plan has it. A backward that is
    run a second time (`retain_graph`) or differentiated (`create_graph`) runs all of the forward
    again, as it does without.

    In a model that is not recorded, in a part of one that is called whole, under `torch.compile`,
    and for a parameter or an input of the model it does nothing, as nothing is to be kept or
    nobody looks.

    Args:
        tensor: Any tensor; it may be given several times.

    Returns:
        The tensor itself.

    Raises:
        ExecutionError: It is something else.

    Example:
        >>> def forward(self, x):
        ...     return self.out(keep(self.attention(x)))
    """
    if torch.compiler.is_compiling():
        return tensor
    if not isinstance(tensor, Tensor):
        raise ExecutionError(
            f"keep was given {type(tensor).__name__}; give a tensor, and each of several by itself"
        )
    listener = _LISTENERS.get(get_ident())
    if listener is not None:
        listener(tensor)
    return tensor


def kept(tensor: Tensor) -> Tensor:
    """What a recording calls where the model has called `keep`: it does nothing.

    Args:
        tensor: The value.
    """
    return tensor


kept.__name__ = "keep"  # as it is printed


@contextmanager
def told_of_kept(listener: Callable[[Tensor], Any]) -> Iterator[None]:
    """Tell someone what this thread keeps within a `with` block.

    Args:
        listener: Who is told.
    """
    thread = get_ident()
    before = _LISTENERS.get(thread)
    _LISTENERS[thread] = listener
    try:
        yield
    finally:
        if before is None:
            del _LISTENERS[thread]
        else:
            _LISTENERS[thread] = before
