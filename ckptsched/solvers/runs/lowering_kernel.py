"""The compiled loop of `to_schedule`: stages of one run, written out as packed operations."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...base.jit import compiled
from ...schedule.language import BACKWARD, DROP, TAPED
from .find_runs import Limits

# What a row of the stack asks for, in place of a number of stages.
_DROP, _BACKWARD = -1, -2


@compiled
def lower_in_run(
    values: Any, length: int, m: int, limits: Limits, seconds: float, operations: Any
) -> int:
    """Write out the schedule of stages 1..length of one run.

    Args:
        values: Extra seconds, by slots and length.
        length: Stages.
        m: Slots.
        limits: The run's sizes.
        seconds: Seconds of one forward.
        operations: To fill with packed operations; it must be long enough.

    Returns:
        The number of operations.
    """
    keep, tape = limits[0], limits[1]
    todo = np.empty((3 * length + 8, 3), np.int64)  # stages before, stages, slots
    todo[0, 0], todo[0, 1], todo[0, 2] = 0, length, m
    depth, written = 1, 0
    while depth:
        depth -= 1
        before, count, free = todo[depth, 0], todo[depth, 1], todo[depth, 2]
        if count == _DROP:
            operations[written] = DROP | before << 32
            written += 1
            continue
        if count == _BACKWARD:
            operations[written] = BACKWARD | before << 32
            written += 1
            continue
        split = 0
        if count > 1:
            split = _split_in_run(values, count, free, limits, seconds)
        if split == 0:
            operations[written] = TAPED | (before + 1) << 32
            written += 1
            todo[depth, 0], todo[depth, 1] = before + 1, _BACKWARD
            depth += 1
            if count > 1:
                todo[depth, 0], todo[depth, 1] = before + 1, count - 1
                todo[depth, 2] = free - tape
                depth += 1
            continue
        written = write_sweep(operations, written, before + 1, before + split)
        todo[depth, 0], todo[depth, 1], todo[depth, 2] = before, split, free
        todo[depth + 1, 0], todo[depth + 1, 1] = before + split, _DROP
        todo[depth + 2, 0], todo[depth + 2, 1] = before + split, count - split
        todo[depth + 2, 2] = free - keep
        depth += 3
    return written


@compiled
def _split_in_run(values: Any, count: int, m: int, limits: Any, seconds: float) -> int:
    """The best left part of a segment inside a run; 0 where its first stage is taped."""
    keep, tape, taped, alone, pair = limits
    best, split = np.inf, 0
    if m >= taped and m >= tape:
        best = values[m - tape, count - 1]
    most = 0
    if m >= keep and m >= alone:
        most = count - 1 if m >= pair else 1
    for i in range(1, most + 1):
        found = seconds * i + values[m, i] + values[m - keep, count - i]
        if found < best:
            best, split = found, i
    return split


@compiled
def write_sweep(operations: Any, written: int, first: int, last: int) -> int:
    """Write out runs of stages first..last that keep the last state alone."""
    for stage in range(first, last + 1):
        operations[written] = stage << 32
        written += 1
        if stage > first:
            operations[written] = DROP | (stage - 1) << 32
            written += 1
    return written
