"""The compiled walk through the tables of the chain recurrence: what every segment begins with.

Least memory is exact, in bytes; the seconds come from a table in slots. `to_schedule` says why.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...base.jit import compiled
from .sizes import Slots
from .table_kernel import END, LEAST, ZERO, Integers, Numbers

# What the walk writes, a row an event.
SWEEP, TAPE, TURN, BACKWARD, DROP = range(5)


class Guide(NamedTuple):
    """What a walk goes by: least bytes, and a table of seconds in slots."""

    exact: Slots
    """The sizes in bytes."""
    least: Integers
    """Least bytes of every segment."""
    values: Numbers
    """The rows of a table of the same chain."""
    rows: Integers
    """Where they lie."""
    up: Integers
    """Bytes to add before bytes are divided by the table's slots, by start."""
    unit: int
    """Bytes of its slots."""
    seconds: Numbers
    """Running sum of u_f by stage."""
    extra: Numbers
    """What each taping takes longer than the stage's fastest."""
    top: int
    """The table's largest number of slots; -1 where it is empty."""
    scale: float
    """Bytes count so much where the table is looked up."""


@compiled
def _value(guide: Guide, start: int, t: int, size: int) -> float:
    """E(start, t, size in slots); infinite everywhere where the table is empty."""
    m = min((int(size * guide.scale) + guide.up[start]) // guide.unit, guide.top)
    if m < 0 or m < guide.rows[start, t, LEAST]:
        return np.inf
    if m >= guide.rows[start, t, END]:
        return 0.0
    return float(guide.values[guide.rows[start, t, ZERO] + m])


@compiled
def walk(guide: Guide, size: int, events: Integers) -> tuple[int, float]:
    """Choose for each segment, from the whole chain down, what fits in bytes and takes least.

    Args:
        guide: What the choices go by.
        size: Bytes of the whole chain, no fewer than its least.
        events: What to do, to fill, a row an event: what, from, to. (0 SWEEP s..t, 1 TAPE s by
            option t, 2 TURN, 3 BACKWARD s, 4 DROP state s.)

    Returns:
        The number of events, at most 4 n + 2, and the seconds more than the fastest.
    """
    exact, seconds = guide.exact, guide.seconds
    n = guide.least.shape[1] - 2
    # Entries: start, t, m to solve; a negative event and its stage to write down.
    todo = np.empty((3 * n + 6, 3), np.int64)
    todo[0, 0], todo[0, 1] = -DROP, 0
    todo[1, 0], todo[1, 1], todo[1, 2] = 1, n + 1, size
    waiting, count, total = 2, 0, 0.0
    while waiting:
        waiting -= 1
        start, t, m = todo[waiting, 0], todo[waiting, 1], todo[waiting, 2]
        if start < 0:
            events[count, 0], events[count, 1], events[count, 2] = -start, t, 0
            count += 1
            continue
        s = exact.stage[start]
        if s == n + 1:
            events[count, 0], events[count, 1], events[count, 2] = TURN, 0, 0
            count += 1
            continue
        way, j = _choose(guide, start, t, m)
        if j:
            events[count, 0], events[count, 1], events[count, 2] = SWEEP, s, j - 1
            total += seconds[j - 1] - seconds[s - 1]
            todo[waiting, 0], todo[waiting, 1], todo[waiting, 2] = start, j - 1, m
            todo[waiting + 1, 0], todo[waiting + 1, 1] = -DROP, j - 1
            waiting += 2
            todo[waiting, 0], todo[waiting, 1] = j, t
            todo[waiting, 2] = m - exact.takes[start, j]
            waiting += 1
        else:
            events[count, 0], events[count, 1], events[count, 2] = TAPE, s, exact.option[way]
            total += guide.extra[way]
            todo[waiting, 0], todo[waiting, 1] = -BACKWARD, s
            waiting += 1
            if s < t:
                todo[waiting, 0], todo[waiting, 1] = exact.after[way], t
                todo[waiting, 2] = m - exact.tape[way]
                waiting += 1
        count += 1
    return count, total


@compiled
def _choose(guide: Guide, start: int, t: int, m: int) -> tuple[int, int]:
    """How a segment with m bytes begins: a taping and 0, or any taping and the split j.

    Where the table knows of nothing that fits: a tape if one does, else the split whose longer
    part is shortest.
    """
    way, cost, spare_way = _choose_tape(guide, start, t, m)
    j, spare_j = _choose_split(guide, start, t, m, cost)
    if j or cost < np.inf:
        return way, j
    return spare_way, 0 if spare_way >= 0 else spare_j


@compiled
def _choose_tape(guide: Guide, start: int, t: int, m: int) -> tuple[int, float, int]:
    """The taping of least seconds, these, and the first that fits; -1 where there is none."""
    exact = guide.exact
    best, best_way, spare_way = np.inf, -1, -1
    for way in range(exact.first[start], exact.first[start + 1]):
        if m >= exact.needs[way, t]:
            cost = guide.extra[way]
            if exact.stage[start] < t:
                rest, size = exact.after[way], m - exact.tape[way]
                if size < guide.least[rest, t]:
                    continue
                cost += _value(guide, rest, t, size)
            if spare_way < 0:
                spare_way = way
            if cost < best:
                best, best_way = cost, way
    return best_way, best, spare_way


@compiled
def _choose_split(guide: Guide, start: int, t: int, m: int, best: float) -> tuple[int, int]:
    """The split of fewer seconds than `best`, and the one whose longer part is shortest."""
    exact, least, seconds, s = guide.exact, guide.least, guide.seconds, guide.exact.stage[start]
    best_j, spare_j, spare_length = 0, 0, t + 2
    more = exact.level[t] + exact.handed[start]
    for j in range(s + 1, t + 1):
        cost = seconds[j - 1] - seconds[s - 1]
        if cost >= best or exact.sweep[s, j] + more > m:
            break  # both rise with j
        size = m - exact.takes[start, j]
        if size < least[j, t] or m < least[start, j - 1]:
            continue
        if max(j - s, t - j) < spare_length:
            spare_length, spare_j = max(j - s, t - j), j
        cost += _value(guide, j, t, size)
        if cost < best:
            cost += _value(guide, start, j - 1, m)
            if cost < best:
                best, best_j = cost, j
    return best_j, spare_j
