"""The compiled walk through the tables of the chain recurrence: what every segment begins with.

Least memory is exact, in bytes; the seconds come from a table in slots. `to_schedule` says why.
"""

from __future__ import annotations

import numpy as np

from ...base.jit import compiled
from .sizes import Slots
from .table_kernel import END, LEAST, ZERO, Integers, Numbers

# What the walk writes, a row an event.
SWEEP, TAPE, TURN, BACKWARD, DROP = range(5)


@compiled
def _value(values: Numbers, rows: Integers, start: int, t: int, m: int, top: int) -> float:
    """E(start, t, m); infinite everywhere where the table is empty, with a top of -1."""
    m = min(m, top)
    if m < 0 or m < rows[start, t, LEAST]:
        return np.inf
    if m >= rows[start, t, END]:
        return 0.0
    return float(values[rows[start, t, ZERO] + m])


@compiled
def walk(
    exact: Slots,
    least: Integers,
    values: Numbers,
    rows: Integers,
    up: Integers,
    unit: int,
    seconds: Numbers,
    extra: Numbers,
    top: int,
    size: int,
    scale: float,
    events: Integers,
) -> tuple[int, float]:
    """Choose for each segment, from the whole chain down, what fits in bytes and takes least.

    Args:
        exact: The sizes in bytes.
        least: Least bytes of every segment.
        values: The rows of a table of the same chain.
        rows: Where they lie.
        up: Bytes to add before bytes are divided by the table's slots, by start.
        unit: Bytes of its slots.
        seconds: Running sum of u_f by stage.
        extra: What each taping takes longer than the stage's fastest.
        top: The table's largest number of slots.
        size: Bytes of the whole chain, no fewer than its least.
        scale: Bytes count so much where the table is looked up.
        events: What to do, to fill, a row an event: what, from, to. (0 SWEEP s..t, 1 TAPE s by
            option t, 2 TURN, 3 BACKWARD s, 4 DROP state s.)

    Returns:
        The number of events, at most 4 n + 2, and the seconds more than the fastest.
    """
    n = least.shape[1] - 2
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
        way, j = _choose(
            exact, least, values, rows, up, unit, seconds, extra, top, start, s, t, m, scale
        )
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
            total += extra[way]
            todo[waiting, 0], todo[waiting, 1] = -BACKWARD, s
            waiting += 1
            if s < t:
                todo[waiting, 0], todo[waiting, 1] = exact.after[way], t
                todo[waiting, 2] = m - exact.tape[way]
                waiting += 1
        count += 1
    return count, total


@compiled
def _choose(
    exact: Slots,
    least: Integers,
    values: Numbers,
    rows: Integers,
    up: Integers,
    unit: int,
    seconds: Numbers,
    extra: Numbers,
    top: int,
    start: int,
    s: int,
    t: int,
    m: int,
    scale: float,
) -> tuple[int, int]:
    """How a segment with m bytes begins: a taping and 0, or any taping and the split j.

    Where the table knows of nothing that fits: a tape if one does, else the split whose longer
    part is shortest.
    """
    n = least.shape[1] - 2
    best, best_way, best_j = np.inf, -1, 0
    spare_way, spare_j, spare_length = -1, 0, n + 2
    for way in range(exact.first[start], exact.first[start + 1]):
        if m >= exact.needs[way, t]:
            cost = extra[way]
            if s < t:
                rest, size = exact.after[way], m - exact.tape[way]
                if size < least[rest, t]:
                    continue
                at = (int(size * scale) + up[rest]) // unit
                cost += _value(values, rows, rest, t, at, top)
            if spare_way < 0:
                spare_way = way
            if cost < best:
                best, best_way = cost, way
    here = (int(m * scale) + up[start]) // unit
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
        at = (int(size * scale) + up[j]) // unit
        cost += _value(values, rows, j, t, at, top)
        if cost < best:
            cost += _value(values, rows, start, j - 1, here, top)
            if cost < best:
                best, best_j = cost, j
    if best < np.inf:
        return best_way, best_j
    return spare_way, 0 if spare_way >= 0 else spare_j
