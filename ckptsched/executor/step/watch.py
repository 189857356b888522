"""Who watches the operations of a step: a profiler, a recording of CUDA's memory, or a measurement.

Where nobody does, a step runs as it is, a stretch of operations at a time. Where somebody does, its
operations run one by one, each inside what the watcher gives for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeAlias

import torch

from ...memory.profiler_trace import profiler_at_work
from ...schedule.language import Code
from ..prepared_plan import PreparedPlan

Watch: TypeAlias = Callable[[int, int], AbstractContextManager[object]]
"""Gives what is around operations, from one position in the schedule to another."""

_VERBS = {
    int(Code.FORWARD): "forward",
    int(Code.TAPED_FORWARD): "forward with tape",
    int(Code.BACKWARD): "backward",
}
_UNNAMED: AbstractContextManager[object] = nullcontext()


def watch_of(prepared: PreparedPlan, device: torch.device) -> Watch | None:
    """Who watches operations that run now; None where nobody does.

    Args:
        prepared: The plan that is followed.
        device: Where it runs.
    """
    if prepared.watch is not None:
        return prepared.watch
    if profiler_at_work() or (device.type == "cuda" and _memory_is_recorded()):
        return partial(_named, prepared, device)
    return None


def range_name(prepared: PreparedPlan, p: int, end: int) -> str:
    """What profiles call operations, such as "ckptsched: forward again layers.0"; empty for drops.

    Args:
        prepared: The plan.
        p: Position of the first.
        end: That of the first which is none of them.
    """
    script = prepared.script
    verb = _VERBS.get(script.codes.data[p])
    if verb is None:
        return ""
    # A block's forward runs nothing again, and its backward nothing else.
    if script.codes.data[p] != Code.BACKWARD and p > script.segments.turn:
        verb = verb.replace("forward", "forward again")
    name_of, numbers = prepared.plan.chain.stage_name, script.numbers.data
    names = dict.fromkeys((name_of(numbers[p]), name_of(numbers[end - 1])))
    return f"ckptsched: {verb} {' to '.join(names)}"


def _named(
    prepared: PreparedPlan, device: torch.device, p: int, end: int
) -> AbstractContextManager[object]:
    name = range_name(prepared, p, end)
    if not name:
        return _UNNAMED
    return _range(name, in_snapshots=device.type == "cuda")


@contextmanager
def _range(name: str, *, in_snapshots: bool) -> Iterator[None]:
    """A range of profilers, NVTX and snapshots of memory, whose blocks have its name besides."""
    # Private names of torch, and rather new: without them a snapshot has the ranges alone.
    get: Any = getattr(torch._C, "_cuda_getMemoryMetadata", None) if in_snapshots else None
    put: Any = getattr(torch._C, "_cuda_setMemoryMetadata", None) if in_snapshots else None
    with torch.autograd.profiler.record_function(name):
        if get is None or put is None:
            yield
            return
        before = get()
        put(name)
        try:
            yield
        finally:
            put(before)


def _memory_is_recorded() -> bool:
    """Whether `torch.cuda.memory._record_memory_history` is on; False where torch does not tell."""
    asked: Any = getattr(torch._C, "_cuda_isHistoryEnabled", None)
    return asked is not None and bool(asked())
