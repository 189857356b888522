"""Compiled functions: machine code is kept on disk, which processes read and write in turn.

numba numbers the files of a function's signatures by an index, and does not lock it: of processes
that first compile two signatures of one function at the same moment, as the ranks of a fresh
installation do, one may be left with an index that names the other's machine code. It would then
compute wrong numbers, in this run and in all later ones.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast, final

try:
    import fcntl
except ImportError:  # Windows: as numba does it
    fcntl = None  # type: ignore[assignment]

_Function = TypeVar("_Function", bound=Callable[..., Any])

_LOCK = ".ckptsched.lock"
_PATIENCE_SECONDS, _POLL_SECONDS = 10.0, 0.005


_linking = threading.RLock()


def compiled(function: _Function) -> _Function:
    """Compile a function when it is first called, and keep the machine code on disk.

    The compiler is imported no earlier: it takes longer than most plans.
    """
    return cast(_Function, _Kernel(function))


@final
class _Kernel:
    """A function that is compiled, with all that it calls, when it is first called."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._begun: Any = None  # not all that it calls may be there yet
        self._machine_code: Any = None

    def __call__(self, *arguments: Any) -> Any:
        return self.made()(*arguments)

    def made(self) -> Any:
        """The compiled function, for the compiler to find in place of this object."""
        if self._machine_code is not None:
            return self._machine_code
        with _linking:
            if self._begun is None:
                self._begun = _made(self._function)
                names = self._function.__globals__
                for name, value in list(names.items()):
                    if isinstance(value, _Kernel):
                        names[name] = value.made()
                self._machine_code = self._begun
            return self._begun


def _made(function: Callable[..., Any]) -> Any:
    _fork_while_nothing_is_compiled()
    import numba

    kernel = numba.njit(cache=True, nogil=True)(function)
    cache = getattr(kernel, "_cache", None)
    if cache is not None and hasattr(cache, "cache_path"):  # else another numba, left as it is
        for name in ("load_overload", "save_overload"):
            if hasattr(cache, name):
                setattr(cache, name, _in_turn(getattr(cache, name), cache))
    return kernel


@functools.cache
def _fork_while_nothing_is_compiled() -> None:
    """In a process that is forked while something is compiled nobody would end that."""
    if not hasattr(os, "register_at_fork"):
        return
    with contextlib.suppress(ImportError):  # it is not public
        from numba.core.compiler_lock import global_compiler_lock as lock

        os.register_at_fork(
            before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release
        )


def _in_turn(method: Callable[..., Any], cache: Any) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        with turn(Path(cache.cache_path)):
            return method(*arguments)

    return call


@contextlib.contextmanager
def turn(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; go on without it where that cannot be, or not in 10 seconds.

    Args:
        folder: Where the machine code is kept; it need not exist yet.
    """
    if fcntl is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # of read-only folders, and file systems without locks
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / _LOCK, "ab"))
            _lock(file.fileno())
            # Closing it would not do where a process forked meanwhile has it open too.
            stack.callback(fcntl.flock, file.fileno(), fcntl.LOCK_UN)
        yield


def _lock(descriptor: int) -> None:
    end = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= end:
                return
            time.sleep(_POLL_SECONDS)
