"""Meters: how many bytes of tensors are alive while a piece of a program runs, to the byte.

Two meters count on the CPU: `AllocatorMeter`, cheap and complete, where there is a C++ compiler,
and `ProfilerMeter`, everywhere; they agree but for what worker threads allocate. Both see what
operations allocate for themselves (im2col buffers, oneDNN scratch memory), which counting tensors
in Python does not. `CudaMeter` reads the statistics of CUDA's caching allocator. `default_meter`
picks one.
"""

from __future__ import annotations

import abc
import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeVar, final

import torch
from torch import Tensor

from ckptsched.base.errors import ProfileError
from ckptsched.memory.counting_allocator import counting_allocator
from ckptsched.memory.profiler_trace import DEVICE_TYPES, recording
from ckptsched.tensors.wrapper_tensors import all_parts
from ckptsched.torch_state.locks import in_forked_process

T = TypeVar("T")

# One turn of a meter: the live bytes at its end and the largest number of live bytes in it.
_Reading = tuple[int, int]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Bytes of the tensors that were born inside a window.

    Memory that was allocated before the window counts neither while it lives nor when it is freed.
    """

    start_bytes: int = 0
    """Bytes alive at the start: 0 for a whole window, any number for a later phase of one."""
    peak_bytes: int
    """Largest number of bytes alive at any one time, the start included."""
    final_bytes: int
    """Bytes alive at the end."""


@final
class Window:
    """A window of a meter; `mark` divides it into phases, and its figures follow when it closes."""

    def __init__(self, mark: Callable[[], None]) -> None:
        self._mark = mark
        self._phases: tuple[Measurement, ...] | None = None

    def mark(self) -> None:
        """End a phase and start the next; a ProfileError if the window is closed."""
        if self._phases is not None:
            raise ProfileError("a phase was to end in a window that is closed; mark inside `with`")
        self._mark()

    @property
    def phases(self) -> tuple[Measurement, ...]:
        """The phases in order: one more than there were marks.

        Raises:
            ProfileError: If the window is still open, or was left by an exception.
        """
        if self._phases is None:
            raise ProfileError(
                "the figures of a window were asked for, but it is open or was left by an "
                "exception; ask once its `with` block has ended"
            )
        return self._phases

    @property
    def measurement(self) -> Measurement:
        """The whole window; raises as `phases` does."""
        phases = self.phases
        peak = max(phase.peak_bytes for phase in phases)
        return Measurement(peak_bytes=peak, final_bytes=phases[-1].final_bytes)

    def _finish(self, readings: Iterable[_Reading]) -> None:
        phases: list[Measurement] = []
        start = 0
        for live, peak in readings:
            phases.append(Measurement(start_bytes=start, peak_bytes=peak, final_bytes=live))
            start = live
        self._phases = tuple(phases)


class Meter(abc.ABC):
    """Counts bytes of tensors that are born inside a window, on one device.

    A meter has one window at a time in a process; meters of different classes do not mind each
    other. A meter may be used again after an exception.
    """

    name: ClassVar[str]
    """What CKPTSCHED_METER calls it."""

    @abc.abstractmethod
    def window(self) -> contextlib.AbstractContextManager[Window]:
        """Count from the start of the `with` block to its end, after which the figures are there.

        A ProfileError if a window of this kind of meter is already open.
        """

    def measure(self, fn: Callable[[], T]) -> tuple[T, Measurement]:
        """Run a function inside a window; its exceptions are handed on.

        Returns its result, which is alive at the end of the window, and counts, and the bytes.
        Raises as `window` does.
        """
        with self.window() as window:
            result = fn()
        return result, window.measurement


@final
class _Window:
    """Whether a kind of meter has a window open, and in which thread."""

    def __init__(self, close: Callable[[], object] = lambda: None) -> None:
        self._lock = threading.Lock()
        self._close = close
        self._thread = 0
        in_forked_process(self._renew)

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Have the only window, or say that there is one."""
        if not self._lock.acquire(blocking=False):
            raise ProfileError(
                f"a window of the {name} meter was asked for while another is open, around it or "
                "in another thread; close that one first, or divide it by Window.mark()"
            )
        try:
            self._thread = threading.get_ident()
            yield
        finally:
            self._lock.release()

    def _renew(self) -> None:
        """In a forked process: close what a thread has open that is not there."""
        if self._lock.locked() and self._thread != threading.get_ident():
            self._lock = threading.Lock()
            self._close()


# ---- the counting allocator ----------------------------------------------------------------------


@final
class AllocatorMeter(Meter):
    """CPU: an allocator that counts, compiled on first use and kept in the user's cache folder.

    Counts blocks of all threads. It wraps PyTorch's CPU allocator from the first use to the end of
    the process; outside of windows that costs nanoseconds. What is not seen: a storage from before
    the first use that is resized, as it keeps its allocator; memory of other libraries.

    Args:
        own_thread: Whether blocks that other threads of Python's make do not count. Those of worker
            threads inside operations do.

    Raises:
        ProfileError: If `available()` is false; the message says why.
    """

    name: ClassVar[str] = "allocator"
    _only: ClassVar[_Window] = _Window(lambda: counting_allocator().close())

    def __init__(self, *, own_thread: bool = False) -> None:
        self.own_thread = own_thread
        try:
            self._allocator = counting_allocator()
        except ProfileError as error:
            raise ProfileError(
                f"the counting allocator is not available: {error}; use ProfilerMeter, which gives "
                "the same figures more slowly"
            ) from None

    @staticmethod
    def available() -> bool:
        """Whether the allocator could be built and installed here; the first call does so."""
        try:
            counting_allocator()
        except ProfileError:
            return False
        return True

    @contextlib.contextmanager
    def window(self) -> Iterator[Window]:  # noqa: D102 - inherited
        readings: list[_Reading] = []
        with self._only.alone(self.name):
            window = Window(lambda: readings.append(self._allocator.read()))
            self._allocator.open(own_thread=self.own_thread)
            try:
                yield window
                window.mark()
            finally:
                missed = self._allocator.close()
            if missed:
                raise ProfileError(
                    f"{missed} blocks of the window could not be counted: the CPU allocator that "
                    "is wrapped changes its deleter from block to block; use ProfilerMeter"
                )
            window._finish(readings)


# ---- the profiler --------------------------------------------------------------------------------


@final
class ProfilerMeter(Meter):
    """CPU or CUDA: the memory events of `torch.profiler`, from the trace that it exports.

    Counts blocks of the calling thread and of autograd's threads, not those of other threads. So
    it misses what kernels allocate in worker threads of their own; few do (on the CPU, the backward
    pass of attention: a kilobyte a thread). Blocks on CUDA count as the caching allocator rounds
    them. The process's first window starts the profiler and may take seconds. What a window writes
    to stderr is handed on when it closes, without the profiler's own chatter.

    Args:
        device: The device whose blocks count.

    Raises:
        ProfileError: If the profiler does not report blocks of such a device.
    """

    name: ClassVar[str] = "profiler"
    _only: ClassVar[_Window] = _Window()

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        if self.device.type not in DEVICE_TYPES:
            raise ProfileError(
                f"the profiler meter was asked for device {str(self.device)!r}; it counts on "
                f"{' and '.join(DEVICE_TYPES)}"
            )

    @contextlib.contextmanager
    def window(self) -> Iterator[Window]:  # noqa: D102 - inherited
        with self._only.alone(self.name):
            with recording(self.device) as seen:
                window = Window(seen.mark)
                yield window
                window.mark()
            window._finish(seen.readings)


# ---- CUDA ----------------------------------------------------------------------------------------


@final
class CudaMeter(Meter):
    """CUDA: the statistics of the caching allocator, less what they were at the start.

    Counts blocks of all threads, and synchronises at the ends of a phase. The allocator knows sums
    only: where a window frees memory from before it, the figures are too low by up to that much,
    so keep older tensors alive inside the window (or use `ProfilerMeter("cuda")`). Resets the
    peaks that `torch.cuda.max_memory_allocated` gives.

    Args:
        device: A CUDA device.
        requested: Count the bytes that were asked for, as on the CPU, not those of the blocks,
            which are rounded up to 512 bytes or more.

    Raises:
        ProfileError: If there is no such device.
    """

    name: ClassVar[str] = "cuda"
    _only: ClassVar[_Window] = _Window()

    def __init__(self, device: torch.device | str = "cuda", *, requested: bool = False) -> None:
        self.device = torch.device(device)
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if self.device.type != "cuda" or (self.device.index or 0) >= found:
            raise ProfileError(
                f"the CUDA meter was asked for device {str(self.device)!r}; found {found} CUDA "
                "devices; use AllocatorMeter or ProfilerMeter on the CPU"
            )
        self.requested = requested

    @contextlib.contextmanager
    def window(self) -> Iterator[Window]:  # noqa: D102 - inherited
        readings: list[_Reading] = []
        with self._only.alone(self.name):
            base, _ = self._read()

            def mark() -> None:
                live, peak = self._read()
                readings.append((max(0, live - base), max(0, peak - base)))

            window = Window(mark)
            yield window
            window.mark()
            window._finish(readings)

    def _read(self) -> _Reading:
        """The bytes now and the largest since the last call."""
        torch.cuda.synchronize(self.device)
        stats = torch.cuda.memory_stats(self.device)
        kind = "requested_bytes" if self.requested else "allocated_bytes"
        torch.cuda.reset_peak_memory_stats(self.device)
        return int(stats[f"{kind}.all.current"]), int(stats[f"{kind}.all.peak"])


# ---- the front door ------------------------------------------------------------------------------


def default_meter(device: torch.device | str, *, own_thread: bool = False) -> Meter:
    """The best meter for a device that is available here.

    On the CPU an `AllocatorMeter`, or a `ProfilerMeter` where there is no C++ compiler; on CUDA a
    `CudaMeter`. The environment variable CKPTSCHED_METER overrides it: "profiler" or "allocator".

    Args:
        device: The device whose tensors count.
        own_thread: Whether what other threads of Python's allocate is not to count, where the meter
            can tell: on CUDA's it cannot.

    Raises:
        ProfileError: If there is no meter for the device, or not the one that was asked for.
    """
    device = torch.device(device)
    asked = os.environ.get("CKPTSCHED_METER", "")
    if asked not in ("", ProfilerMeter.name, AllocatorMeter.name):
        raise ProfileError(
            f"CKPTSCHED_METER is {asked!r}; it may be 'profiler', 'allocator' or unset"
        )
    if device.type not in ("cpu", "cuda") or (asked == "allocator" and device.type != "cpu"):
        raise ProfileError(
            f"no {asked + ' ' if asked else ''}meter counts on device {str(device)!r}; there are "
            "'allocator' and 'profiler' for cpu, 'profiler' and the default for cuda"
        )
    if asked == ProfilerMeter.name:
        return ProfilerMeter(device)
    if device.type == "cuda":
        return CudaMeter(device, requested=True)
    if asked == AllocatorMeter.name or AllocatorMeter.available():
        return AllocatorMeter(own_thread=own_thread)
    return ProfilerMeter(device)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind dense tensors, each counted once and whole.

    Works on fake and meta tensors too. A ProfileError where a tensor has no one storage.
    """
    # Keyed by identity, as storages without memory have no address. The references kept here make
    # PyTorch give the same object for the same storage.
    storages: dict[int, torch.UntypedStorage] = {}
    for tensor in all_parts(tensors):
        if tensor.layout is not torch.strided:
            raise ProfileError(
                f"storage_bytes was given a tensor of layout {tensor.layout}; it counts dense "
                "tensors: give it the tensors of indices and values instead"
            )
        storage = tensor.untyped_storage()
        storages[id(storage)] = storage
    return sum(storage.nbytes() for storage in storages.values())
