"""Runs one thing several times in a process of its own: seconds, memory, and a limit on both.

A process of its own, as what ran before (tables, caches, a grown heap) would show in its figures,
and as it is the only way to end a computation that takes too long.
"""

from __future__ import annotations

import gc
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, final

from ckptsched.base.errors import CkptschedError

# Runs that take longer are not repeated: their noise is small beside what they take.
_LONG_SECONDS = 60.0
_KIB = 1024  # Linux counts ru_maxrss in it


@final
@dataclass(frozen=True)
class Timing:
    """What was seen."""

    seconds: tuple[float, ...]
    """Wall-clock seconds of each run that ended."""
    peak_bytes: int
    """Peak resident memory of the process, interpreter and libraries included."""
    base_bytes: int
    """Resident memory before the first run."""
    found: Any
    """What `read` made of the last result; None where there is none."""
    note: str = ""
    """Why there is no result: a limit or an error."""

    @property
    def median(self) -> float:
        """Median of the seconds; infinite where no run ended."""
        return statistics.median(self.seconds) if self.seconds else float("inf")

    def to_json(self) -> dict[str, Any]:
        """Figures as JSON data; the result is not among them."""
        data: dict[str, Any] = {"seconds": [round(x, 6) for x in self.seconds]}
        if self.seconds:
            data["median_seconds"] = round(self.median, 6)
        data |= {"peak_mib": self.peak_bytes >> 20, "base_mib": self.base_bytes >> 20}
        return data | ({"note": self.note} if self.note else {})


def measure(
    work: Callable[[], Any],
    *,
    read: Callable[[Any], Any] = lambda result: None,
    warm_up: Callable[[], Any] = lambda: None,
    repetitions: int = 3,
    limit_seconds: float = 60.0,
) -> Timing:
    """Run `work` in a fork of this process.

    Args:
        work: What is timed.
        read: Turns the last result into something small, not timed.
        warm_up: Runs before, not timed: compiles, and imports what is imported late.
        repetitions: Runs; a single one where it takes longer than a minute.
        limit_seconds: A run that takes longer is ended, and there is no result.

    Returns:
        The figures; errors are noted, not raised.
    """
    context = multiprocessing.get_context("fork")  # closures and loaded libraries come along
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_run, args=(there, work, read, warm_up, repetitions))
    child.start()
    there.close()
    seconds: list[float] = []
    peak = base = 0
    found, note = None, ""
    try:
        # Warming up and reading are not limited as strictly: compilation takes its time.
        patience = limit_seconds + _LONG_SECONDS
        while True:
            if not here.poll(patience):
                note = f"> {limit_seconds:g} s"
                break
            kind, value = here.recv()
            patience = limit_seconds
            if kind == "ready":
                base = value
            elif kind == "run":
                run, peak = value
                seconds.append(run)
                patience = limit_seconds + _LONG_SECONDS  # it may be reading by now
            else:
                found, note = (value, "") if kind == "found" else (None, value)
                break
    except EOFError:
        note = "the process ended by itself, perhaps for lack of memory"
    finally:
        child.kill()
        child.join()
    return Timing(tuple(seconds), peak, base, found, note)


def _run(
    pipe: Connection,
    work: Callable[[], Any],
    read: Callable[[Any], Any],
    warm_up: Callable[[], Any],
    repetitions: int,
) -> None:
    try:
        warm_up()
        gc.collect()
        pipe.send(("ready", _resident()))
        result = None
        for _ in range(repetitions):
            result = None  # the last one's memory goes first
            start = time.perf_counter()
            result = work()
            seconds = time.perf_counter() - start
            pipe.send(("run", (seconds, _resident())))
            if seconds > _LONG_SECONDS:
                break
        pipe.send(("found", read(result)))
    except CkptschedError as error:
        pipe.send(("failed", str(error)[:300]))
    except Exception as error:
        pipe.send(("failed", f"{type(error).__name__}: {error}"[:300]))


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB
