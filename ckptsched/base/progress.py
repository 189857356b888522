"""How far a long computation has come, told to whoever listens.

Solvers neither print nor read a clock. They say how far they are, and what wants to show it
listens around the call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TypeAlias

Listener: TypeAlias = Callable[[str, float], None]
"""Called with what is being done, and which share of it is done, from 0 to 1."""

_listener: ContextVar[Listener | None] = ContextVar("ckptsched_progress", default=None)


def report(what: str, share: float) -> None:
    """Say how far a computation is; does nothing where nobody listens.

    Args:
        what: What is being done, such as "table of 500 stages".
        share: How much of it is done, from 0 to 1.
    """
    listener = _listener.get()
    if listener is not None:
        listener(what, share)


def is_heard() -> bool:
    """Whether somebody listens."""
    return _listener.get() is not None


@contextlib.contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """Have what is computed inside tell a listener how far it is; None: nobody.

    Args:
        listener: Called from the computing thread; it must be quick.
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
