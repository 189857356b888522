"""The binomial schedule as packed operations, by a compiled loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ...base.jit import compiled
from ..runs.lowering_kernel import write_sweep

# Larger than any number of stages: binomial coefficients beyond are only known to be so large.
_LARGE = 1 << 40
# What an entry of the stack asks for, in place of a number of stages.
_DROP = 0


@compiled
def beta(s: int, r: int) -> int:
    """(s + r)! / (s! r!); a larger number than 2**40 where it exceeds that, 0 below 0."""
    if s < 0 or r < 0:
        return 0
    few, found = min(s, r), 1
    for k in range(1, few + 1):
        found = found * (s + r - few + k) // k  # each is a binomial coefficient
        if found > _LARGE:
            return found
    return found


@compiled
def first_advance(stages: int, states: int) -> int:
    """Stages to run before the first state beside the input is kept: see `revolve`."""
    s = min(states, stages - 1)
    if s == 1:
        return stages - 1
    if s == stages - 1:
        return 1
    r = 1
    while beta(s, r) < stages:
        r += 1
    a, b = beta(s, r - 1), beta(s - 2, r - 1)
    if stages <= a + b:
        return beta(s, r - 2)
    c = beta(s - 1, r - 1)
    return stages - c - b if stages < a + b + c else a


@compiled
def write_out(stages: int, states: int, operations: npt.NDArray[np.int64]) -> int:
    """Write the binomial schedule.

    Args:
        stages: Length of the chain.
        states: States kept at once, the input included.
        operations: To fill: 2 t(l, s) + 2 l + 2 packed operations.

    Returns:
        The number of operations.
    """
    # Stages before, stages, states. Each state that is kept adds two entries.
    todo = np.empty((2 * min(states, stages) + 2 * 64 + 8, 3), np.int64)
    todo[0] = (0, stages, states)
    depth, written = 1, 0
    while depth:
        depth -= 1
        first, length, s = todo[depth]
        if length == _DROP:
            operations[written] = 5 | first << 32
            written += 1
        elif length == 1:
            written = _reverse(operations, written, first + 1, stages)
        else:
            split = first_advance(length, s)
            written = write_sweep(operations, written, first + 1, first + split)
            if depth + 3 > len(todo):
                todo = np.concatenate((todo, np.empty_like(todo)))
            todo[depth] = (first, split, s)
            todo[depth + 1] = (first + split, _DROP, 0)
            todo[depth + 2] = (first + split, length - split, max(s - 1, 1))
            depth += 3
    return written


@compiled
def _reverse(operations: Any, written: int, stage: int, stages: int) -> int:
    """A stage with tape, and its backward; the loss between for the last, the end of the first."""
    operations[written] = 1 | stage << 32
    written += 1
    if stage == stages:
        operations[written] = 2
        written += 1
    operations[written] = 3 | stage << 32
    written += 1
    if stage == 1:
        operations[written] = 5
        written += 1
    return written
