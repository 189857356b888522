"""Locks for one thread at a time, lent while autograd's engine works for that thread.

Autograd runs the nodes of a graph in threads of its own where they are on a GPU. A thread that
holds a lock and calls the engine waits for those threads, and a node that asks for the same lock
would wait for ever: one of a planned model inside the stage that is gone back through, or one that
another thread has the same engine's thread run. So who calls the engine lends its locks. While it
waits, nodes come in one after the other, and it goes on once the last of them has left. What they
do leaves no trace, so it finds everything as it was. A thread that such a node has started, and
waits for, comes in as well.

A process that is forked has one thread. What the others held there, nobody would ever let go, so
in a forked process it is free.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from threading import get_ident
from typing import Any, final

import torch

from ..base.errors import ExecutionError
from .waiting_threads import is_blocked, waits_for_caller

_POLL_SECONDS = 0.005  # between two looks whether a lock that is held is lent
_PATIENCE_SECONDS = 60.0  # with a thread that waits for another while it has the turn

# Not public, though torch's own checkpoint asks it: without, nothing is lent.
_graph_task: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)


def in_engine() -> bool:
    """Whether the calling thread runs a node of a graph for autograd's engine."""
    return _graph_task() != -1


def in_forked_process(renew: Callable[[], None]) -> None:
    """Have something called in each process that is forked, in its one thread, before all else."""
    if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
        os.register_at_fork(after_in_child=renew)


@final
class Stay:
    """One thread's hold of a lock, from when it comes in to when it leaves."""

    __slots__ = ("above", "below", "depth", "ended", "lent", "lock", "thread")

    def __init__(self, thread: int) -> None:
        self.thread = thread
        self.depth = 1
        self.lent = self.ended = False
        self.above = threading.RLock()
        """For who comes in while it is lent."""
        self.lock: Any = None
        """What it holds: the lock itself, or `above` of the stay below."""
        self.below: Stay | None = None

    def lets_in(self, within: Iterable[Stay]) -> bool:
        """Whether the calling thread may come in on top of it."""
        if self in within:
            return True
        mine = self.thread == get_ident() or in_engine()
        return self.lent and (mine or waits_for_caller(self.thread))

    def is_stuck(self) -> bool:
        """Whether its thread has lent it, and waits for some thread itself."""
        return self.lent and self.thread != get_ident() and is_blocked(self.thread)


class _Mine(threading.local):
    """The stays of one thread, in the order in which they began."""

    def __init__(self) -> None:
        self.stays: list[Stay] = []


_mine = _Mine()
_locks: weakref.WeakSet[LendingLock] = weakref.WeakSet()
_waiting: set[int] = set()


@final
class LendingLock:
    """A lock that its holder may take again, and lends to nodes of the engine that it calls.

    A copy is a lock of its own.
    """

    __slots__ = ("__weakref__", "_last", "_lock", "_threads")

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._last: Stay | None = None
        self._threads: set[int] = set()
        _locks.add(self)

    def __reduce__(self) -> tuple[type[LendingLock], tuple[()]]:
        return LendingLock, ()

    def __enter__(self) -> None:
        self.enter((), [])

    def __exit__(self, *exception: object) -> None:
        stay = self._last
        assert stay is not None
        self.leave(stay, stay.depth - 1)

    def mine(self) -> tuple[Stay, ...]:
        """The stay of the calling thread, if it holds the lock."""
        last = self._last
        return () if last is None or last.thread != get_ident() else (last,)

    def is_wanted_elsewhere(self) -> bool:
        """Whether other threads have had it already, and may ask for it again."""
        return bool(self._threads - {get_ident()})

    def enter(self, within: Sequence[Stay], entered: list[tuple[LendingLock, Stay, int]]) -> None:
        """Wait for the lock, and hold it.

        Args:
            within: Stays during which what asks now was made: who made it waits for it, in another
                thread maybe, so it need not wait for them.
            entered: Gets what to leave with, before anything else: an interrupt may come any time.
        """
        thread, last = get_ident(), self._last
        if last is not None and last.thread == thread and not last.lent:
            entered.append((self, last, last.depth))
            last.depth += 1
            return
        stay = Stay(thread)
        entered.append((self, stay, 0))
        stuck_since: float | None = None
        while not self._comes_in(stay, within):
            last = self._last
            if last is None or not last.is_stuck():
                stuck_since = None
            elif stuck_since is None:
                stuck_since = time.monotonic()
            elif time.monotonic() - stuck_since > _PATIENCE_SECONDS:
                raise ExecutionError(
                    "a model that follows a plan was called in a thread while another thread, "
                    f"which has the turn, has waited in a backward for {_PATIENCE_SECONDS:g} "
                    "seconds, maybe for this one: let the node that starts a thread join it "
                    "(Thread.join, Future.result), or run the model in the thread of the backward"
                )

    def _comes_in(self, stay: Stay, within: Sequence[Stay]) -> bool:
        last = self._last
        below = last if last is None or last.lets_in(within) else last.below
        stay.below, stay.lock = below, self._lock if below is None else below.above
        if not stay.lock.acquire(timeout=_POLL_SECONDS):
            return False
        if self._last is below and (below is None or below.lets_in(within)):
            self._last = stay
            _mine.stays.append(stay)
            self._threads.add(stay.thread)
            return True
        stay.lock.release()
        return False

    def leave(self, stay: Stay, depth: int) -> None:
        """End what `enter` has begun, if only just; once more does no harm."""
        stay.depth = depth
        if not depth:
            with stay.above:  # once those have left who came in on top
                self._end(stay)

    def _end(self, stay: Stay) -> None:
        stay.ended = True
        while self._last is not None and self._last.ended:
            self._last = self._last.below
        if stay in _mine.stays:
            _mine.stays.remove(stay)
        with contextlib.suppress(RuntimeError, AttributeError):  # not taken, or let go already
            stay.lock.release()

    def keep_own(self) -> None:
        """In a forked process: free what threads hold that are not there."""
        thread, stay = get_ident(), self._last
        own = []
        while stay is not None:
            if stay.thread == thread:
                own.append(stay)
            stay = stay.below
        self._lock, self._last = threading.RLock(), None
        self._threads &= {thread}
        for stay in reversed(own):
            stay.below, stay.lock = self._last, self._last.above if self._last else self._lock
            stay.lock.acquire()
            stay.above, self._last = threading.RLock(), stay


@final
class Locked:
    """A `with` block in which the calling thread holds some locks, in the order that all ask in."""

    __slots__ = ("_entered", "_locks", "_within")

    def __init__(self, locks: Sequence[LendingLock], within: Sequence[Stay] = ()) -> None:
        self._locks, self._within = locks, within
        self._entered: list[tuple[LendingLock, Stay, int]] = []

    def __enter__(self) -> None:
        try:
            for lock in self._locks:
                lock.enter(self._within, self._entered)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exception: object) -> None:
        while self._entered:
            lock, stay, depth = self._entered[-1]
            lock.leave(stay, depth)
            del self._entered[-1]

    # Of a block that an interrupt ends just as it is entered or left.
    __del__ = __exit__


def is_first() -> bool:
    """Whether the calling thread holds no such lock."""
    return not _mine.stays


def waits(thread: int) -> bool:
    """Whether a thread, by its identity, is waiting for the engine, and has lent its locks."""
    return thread in _waiting


@final
class Lent:
    """A `with` block around a call of the engine: the thread's locks are lent meanwhile."""

    __slots__ = ("_first", "_stays")

    def __enter__(self) -> None:
        self._stays = [stay for stay in _mine.stays if not stay.lent]
        for stay in self._stays:
            stay.lent = True
        thread = get_ident()
        self._first = thread not in _waiting
        _waiting.add(thread)

    def __exit__(self, *exception: object) -> None:
        if self._first:
            _waiting.discard(get_ident())
        for stay in self._stays:  # in the order in which all ask for them
            with stay.above:
                stay.lent = False


def _after_fork() -> None:
    for lock in list(_locks):
        lock.keep_own()
    _waiting.intersection_update({get_ident()})


in_forked_process(_after_fork)
