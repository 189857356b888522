"""The memory events of PyTorch's profiler, read from the trace that it exports.

Only public routes are used, but for one question that PyTorch has no public answer to: whether a
profiler runs already.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, final

import torch

from ckptsched.base.errors import ProfileError

_MARK = "ckptsched.mark"
# c10::DeviceType as traces give it; PyTorch calls ROCm's devices cuda.
DEVICE_TYPES = {"cpu": {0}, "cuda": {1, 20}}
# Kineto logs its own comings and goings, and complains of a missing GPU; c10 says that blocks from
# before the window are not counted, which is what is wanted.
_CHATTER = re.compile(
    rb"^[A-Z]+:\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \d+:\d+ \w+\.(cpp|h):\d+\] "
    rb"|\] Memory block of unknown size was allocated before the profiling started"
)


@final
class Readings:
    """What the profiler saw of one device, from mark to mark."""

    def __init__(self) -> None:
        self.readings: list[tuple[int, int]] = []
        """At each mark: the live bytes, and the largest number of them since the last mark. They
        are there once the recording has ended."""
        self._marks = 0

    def mark(self) -> None:
        """Take a reading at this point of the program."""
        with torch.autograd.profiler.record_function(_MARK):
            self._marks += 1

    def _finish(self, readings: list[tuple[int, int]]) -> None:
        if len(readings) != self._marks:
            raise _lost()
        self.readings = readings


def _lost() -> ProfileError:
    return ProfileError(
        "the profiler lost a window: another profiler was started inside it, or mark() was called "
        "in another thread; measure without profiling, and mark in the thread that measures"
    )


@contextlib.contextmanager
def recording(device: torch.device) -> Iterator[Readings]:
    """Record the blocks of a device, without an index of all of its type, inside the `with` block.

    A ProfileError if a profiler runs already, around this block or inside it.
    """
    if _profiling(unknown=False):
        raise ProfileError(
            "a profiler is running, and measuring by the profiler would spoil its trace; measure "
            "outside of it, or use AllocatorMeter (CPU) or CudaMeter"
        )
    result = Readings()
    with _ours(), _without_chatter(), tempfile.TemporaryDirectory(prefix="ckptsched-") as folder:
        # torch.profiler.profile would add 0.3 ms to a window and nothing that is needed here.
        profiler = torch.autograd.profiler.profile(use_kineto=True, profile_memory=True)
        cancelled = False
        try:
            with profiler:
                yield result
                # Exporting a trace that another profiler has cancelled ends the process.
                cancelled = not _profiling(unknown=True)
        except RuntimeError:  # torch 2.9 does not stop a cancelled profiler
            if not cancelled:
                raise
        if cancelled:
            raise _lost()
        path = Path(folder) / "trace.json"
        export: Callable[[str], None] = profiler.export_chrome_trace
        export(str(path))
        # Not strict: names that users gave to ranges of their own may hold control characters.
        trace = json.loads(path.read_text(encoding="utf-8", errors="replace"), strict=False)
    result._finish(_replay(trace["traceEvents"], device))


_recordings = 0  # of this module, which are under way


@contextlib.contextmanager
def _ours() -> Iterator[None]:
    global _recordings
    _recordings += 1
    try:
        yield
    finally:
        _recordings -= 1


def profiler_at_work() -> bool:
    """Whether a profiler runs that is not one of `recording`; False where PyTorch does not tell."""
    return not _recordings and _profiling(unknown=False)


def _profiling(*, unknown: bool) -> bool:
    """Whether a profiler runs, in this thread or (as Kineto has one session) in another.

    A second profiler silently spoils the first. Where both private names are gone from PyTorch,
    the answer is `unknown`.
    """
    in_thread = getattr(torch.autograd, "_profiler_enabled", None)
    anywhere = getattr(torch.autograd.profiler, "_is_profiler_enabled", None)
    if in_thread is None and anywhere is None:
        return unknown
    return bool(anywhere) or (in_thread is not None and bool(in_thread()))


def _replay(events: Iterable[dict[str, Any]], device: torch.device) -> list[tuple[int, int]]:
    """One reading for each mark in a trace.

    Blocks are told apart by address, as the profiler remembers them from window to window and
    reports when one of an earlier window is freed.
    """
    born: dict[int, int] = {}
    live = peak = 0
    readings: list[tuple[int, int]] = []
    for event in sorted((e for e in events if e["name"] in ("[memory]", _MARK)), key=_time_of):
        if event["name"] == _MARK:
            readings.append((live, peak))
            peak = live
        elif _is_on(device, event["args"]):
            address, size = event["args"]["Addr"], event["args"]["Bytes"]
            # Also where a block is born: another thread may have freed the last one there, unseen.
            live -= born.pop(address, 0)
            if size > 0:
                born[address] = size
                live += size
                peak = max(peak, live)
    return readings


def _time_of(event: dict[str, Any]) -> float:
    return float(event["ts"])


def _is_on(device: torch.device, block: dict[str, Any]) -> bool:
    if block["Device Type"] not in DEVICE_TYPES[device.type]:
        return False
    return device.type == "cpu" or device.index in (None, block["Device Id"])


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Hold back what is written to file descriptor 2, then hand it on without the chatter."""
    try:
        real = os.dup(2)
    except OSError:  # no stderr, as in a daemon
        real = -1
    if real < 0:
        yield
        return
    with tempfile.TemporaryFile() as held:
        _flush_stderr()
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            _flush_stderr()
            os.dup2(real, 2)
            os.close(real)
            held.seek(0)
            kept = b"".join(line for line in held if not _CHATTER.search(line))
            if kept:
                with open(2, "wb", closefd=False) as stderr:
                    stderr.write(kept)


def _flush_stderr() -> None:
    if sys.stderr is not None:
        sys.stderr.flush()
