"""Kernels: loops over plain numbers, run by the interpreter where that is quick, else compiled.

To compile a planner's kernels takes some twenty seconds on a new installation, and to import the
compiler and load their machine code a second in every later process. Most networks have some
dozens of stages, whose loops the interpreter ends in a fraction of that. So a kernel is written as
a plain function, and who calls it says how many steps it takes (`suited`): few are interpreted,
many compiled. Both give the same bits.

Machine code is kept on disk, which processes read and write in turn. numba numbers the files of a
function's signatures by an index, and does not lock it: of processes that first compile two
signatures of one function at the same moment, as the ranks of a fresh installation do, one may be
left with an index that names the other's machine code. It would then compute wrong numbers, in
this run and in all later ones.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar, cast, final

from .progress import report

try:
    import fcntl
except ImportError:  # Windows: as numba does it
    fcntl = None  # type: ignore[assignment]

_Function = TypeVar("_Function", bound=Callable[..., Any])

_LOCK = ".ckptsched.lock"
_PATIENCE_SECONDS, _POLL_SECONDS = 10.0, 0.005
# Steps that are interpreted rather than compiled: about a second. Where machine code is loaded it
# does better from a hundred microseconds on, which handing over the arguments may take.
INTERPRETED_STEPS, LOADED_STEPS = 1_000_000, 100

_linking = threading.RLock()
_namespaces: dict[tuple[int, bool], tuple[dict[str, Any], dict[str, Any]]] = {}


def compiled(function: _Function, *, interpreted: _Function | None = None) -> _Function:
    """Have a function of plain numbers and arrays compiled when it is first called.

    The compiler is imported no earlier. What it calls must be compiled functions, too.

    Args:
        function: The function.
        interpreted: What does the same, to the same bits, in the interpreter: by whole arrays,
            where it is a loop over elements that few calls would make long. It is the function
            itself unless given.
    """
    return cast(_Function, _Kernel(function, interpreted or function))


def suited(kernel: _Function, steps: float) -> _Function:
    """The kernel to call for so much work, which is counted: see `is_interpreted`.

    Args:
        kernel: What `compiled` returned.
        steps: How often its innermost loops are run, about; a microsecond each in the interpreter.
    """
    assert isinstance(kernel, _Kernel)
    machine = not is_interpreted(kernel, steps)
    count_steps(kernel, 0.0 if machine else steps)
    return cast(_Function, kernel.variant(machine=machine))


def is_interpreted(kernel: Callable[..., Any], steps: float) -> bool:
    """Whether a kernel is to do so much work in the interpreter.

    It is compiled when it has cost about as much as that takes, in the whole process.

    Args:
        kernel: What `compiled` returned.
        steps: As `suited` takes them.
    """
    assert isinstance(kernel, _Kernel)
    if kernel.is_loaded:
        return steps <= LOADED_STEPS
    return kernel.interpreted_steps + steps <= INTERPRETED_STEPS


def count_steps(kernel: Callable[..., Any], steps: float) -> None:
    """Count steps of a kernel that the interpreter has done; arguments as of `suited`."""
    assert isinstance(kernel, _Kernel)
    kernel.interpreted_steps += steps


@final
class _Kernel:
    """A function in two variants: as it is, and compiled when it is first called so."""

    def __init__(self, function: Callable[..., Any], interpreted: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._plain = {True: function, False: interpreted}
        self._variants: dict[bool, Callable[..., Any]] = {}
        self.interpreted_steps = 0.0

    def __call__(self, *arguments: Any) -> Any:
        return self.variant(machine=True)(*arguments)

    @property
    def is_loaded(self) -> bool:
        """Whether there is machine code for some arguments in this process."""
        return bool(getattr(self._variants.get(True), "signatures", ()))

    def variant(self, *, machine: bool) -> Any:
        """The function that calls the same variant of other kernels."""
        with _linking:
            if machine not in self._variants:
                plain = self._plain[machine]
                names = _namespace(plain.__globals__, machine)
                # The namespace has made it by now if this is the first of its module.
                if machine not in self._variants:
                    mine = FunctionType(plain.__code__, names, plain.__name__)
                    self._variants[machine] = _made(mine) if machine else mine
            return self._variants[machine]


def _namespace(names: dict[str, Any], machine: bool) -> dict[str, Any]:
    """What a module's functions find by name, with one variant of every kernel there."""
    known = _namespaces.get((id(names), machine))
    if known is None:
        # The module's own names are held with it: as long as they are, their id is taken.
        known = _namespaces[id(names), machine] = names, dict(names)
        for name, value in names.items():
            if isinstance(value, _Kernel):
                known[1][name] = value.variant(machine=machine)
    return known[1]


def _made(function: Callable[..., Any]) -> Any:
    _fork_while_nothing_is_compiled()
    import numba

    kernel = numba.njit(cache=True, nogil=True)(function)
    cache = getattr(kernel, "_cache", None)
    if cache is not None and hasattr(cache, "cache_path"):  # else another numba, left as it is
        for name in ("load_overload", "save_overload"):
            if hasattr(cache, name):
                setattr(cache, name, _in_turn(getattr(cache, name), cache))
        if hasattr(cache, "load_overload"):
            cache.load_overload = _told(cache.load_overload, function.__name__)
    return kernel


def _told(load: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Say that a function is going to be compiled where its machine code is not found."""

    def call(*arguments: Any) -> Any:
        found = load(*arguments)
        if found is None:
            report(f"compiling {name}: done once on this machine", 0.0)
        return found

    return call


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
        with folder_lock(Path(cache.cache_path)):
            return method(*arguments)

    return call


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
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
