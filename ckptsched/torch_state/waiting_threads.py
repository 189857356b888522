"""Whether a thread waits for the calling one, as who starts a thread in a backward and joins it.

Python keeps no record of it, but the stack of the thread that waits shows it: a call of
`Thread.join`, or of `Future.result` where an executor runs the work. Where Python does not show the
stacks of other threads, nothing is known of them.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, thread
from types import FrameType
from typing import Any

_frames: Callable[[], dict[int, FrameType]] = getattr(sys, "_current_frames", dict)
_WAITS = {threading.Thread.join.__code__, Future.result.__code__}
_WORKS: Any = getattr(getattr(thread, "_WorkItem", None), "run", None)
_BLOCKING = {threading.__file__, queue.__file__}


def waits_for_caller(waiting: int) -> bool:
    """Whether a thread, by its identity, goes on only once the calling one has done its work."""
    here = {id(threading.current_thread())}
    own = getattr(_WORKS, "__code__", None)
    here |= {id(work.future) for code, work in _calls(sys._getframe()) if code is own}
    calls = _calls(_frames().get(waiting))
    return any(code in _WAITS and id(awaited) in here for code, awaited in calls)


def is_blocked(waiting: int) -> bool:
    """Whether a thread, by its identity, waits for another one right now, whichever that is."""
    frame = _frames().get(waiting)
    return frame is not None and frame.f_code.co_filename in _BLOCKING


def _calls(frame: FrameType | None) -> Iterator[tuple[Any, Any]]:
    """The methods in which a thread is, from the innermost on, each with its object."""
    while frame is not None:
        if frame.f_code in _WAITS or frame.f_code is getattr(_WORKS, "__code__", None):
            yield frame.f_code, frame.f_locals.get("self")
        frame = frame.f_back
