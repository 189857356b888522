"""The compiled loops of the chain recurrence: least memory, and the table of seconds.

The recurrence stands in `tables`. Its inner operation, for every split j of a segment
(s, t) and all slots m at once, is

    E(s,t)[m] = min(E(s,t)[m], E(j,t)[m - takes] + E(s,j-1)[m] + seconds)

Here four splits share one pass over m. Segments are filled in square tiles of starts and ends, so
that the rows that a tile reads and writes stay in a core's cache; a tile needs only tiles of
shorter segments. A row is stored from its least slots to where it is 0 for good; a split that
costs more than what is found already is not tried for those slots.

Indices: a segment runs from stage s to stage t, n + 1 being the loss; `start` says besides how it
is entered (`sizes.Starts`) and is s itself for the plain way; j splits it into s..j-1, run without
tape, and j..t; m counts slots; `way` is a taping of a start's first stage (`sizes.Tapings`). A row
holds one segment's numbers for all m: rows[start, t] says where.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...base.jit import compiled, suited
from .sizes import Slots

Integers = npt.NDArray[np.int64]
Numbers = npt.NDArray[Any]

# Indices of arrays are unsigned: signed ones might count from the end, which costs a test each.
_at = np.uintp
_SPLITS = 4
_NEVER = 2**61  # more slots than there are; sums of two stay within 64 bits
# A row's place in `rows`: where slot 0 would lie in `values`, least slots, and end.
ZERO, LEAST, END = 0, 1, 2


@compiled
def least_slots(
    slots: Slots, first: int, last: int, free: Any, least: Integers, enough: Integers
) -> None:
    """Least slots of all segments that end in first..last, and those that allow all tapes.

    Args:
        slots: The sizes.
        first: First end t; those before must be known.
        last: Last end t.
        free: Whether a taping takes no longer than the stage's fastest, by taping.
        least: Least slots by start and t, to fill, shape (starts, n + 2).
        enough: Slots from which on nothing is run twice and every tape is the fastest.
    """
    n = least.shape[1] - 2
    for t in range(first, last + 1):
        for s in range(min(t, n + 1), 0, -1):
            if s == n + 1:
                least[s, t] = enough[s, t] = slots.turn
                continue
            start = s
            while start:
                need, full = _least_taped(slots, start, s, t, free, least, enough)
                known, sweep = -1, 0
                more = slots.level[t] + slots.handed[start] + slots.up[start]
                for j in range(s + 1, t + 1):
                    if slots.sweep[s, j] != known:
                        known = slots.sweep[s, j]
                        sweep = (known + more) // slots.unit
                    if sweep >= need:  # needs of sweeps never fall
                        break
                    split = max(slots.takes[start, j] + least[j, t], least[start, j - 1], sweep)
                    need = min(need, split)
                least[start, t] = need
                enough[start, t] = full
                start = slots.other[start]


@compiled
def _least_taped(
    slots: Slots, start: int, s: int, t: int, free: Any, least: Integers, enough: Integers
) -> tuple[int, int]:
    """Least slots to start with a tape, and those from which on that takes no longer."""
    need, full = _NEVER, _NEVER
    for way in range(slots.first[start], slots.first[start + 1]):
        own = slots.needs[way, t]
        rest = all_taped = own
        if s < t:
            rest = max(own, slots.tape[way] + least[slots.after[way], t])
            all_taped = max(own, slots.tape[way] + enough[slots.after[way], t])
        need = min(need, rest)
        if free[way]:
            full = min(full, all_taped)
    return need, full


class _Filling(NamedTuple):
    """What the innermost loops work on: few arrays, as each call hands all of them over."""

    values: Numbers
    rows: Integers
    cut: Integers
    takes: Integers
    sweep: Integers
    seconds: Numbers
    level: Integers
    base: Integers
    unit: int
    top: int
    work: Integers
    costs: Numbers


@compiled
def fill(
    values: Numbers,
    rows: Integers,
    cut: Integers,
    slots: Slots,
    seconds: Numbers,
    extra: Numbers,
    top: int,
    size: int,
    tiles: Integers,
) -> None:
    """Fill tiles of the table, those of shorter segments being filled.

    Args:
        values: The rows, after top + 2 zeros and top + 2 infinities.
        rows: Where each row lies, by start and t: see `ZERO`, `LEAST`, `END`.
        cut: Room for a number a row.
        slots: The sizes.
        seconds: Running sum of u_f by stage.
        extra: What each taping takes longer than the stage's fastest.
        top: The largest number of slots.
        size: Stages along the side of a tile.
        tiles: Its first stage and its first end, a row a tile.
    """
    n = rows.shape[1] - 2
    work, costs = np.empty(7 * _SPLITS, np.int64), np.empty(_SPLITS, values.dtype)
    base = slots.handed + slots.up
    model = (slots.takes, slots.sweep, seconds, slots.level, base, slots.unit, top)
    filling = _Filling(values, rows, cut, *model, work, costs)
    for k in range(len(tiles)):
        s1, t1 = tiles[k, 0], tiles[k, 1]
        s2, t2 = min(s1 + size - 1, n + 1), min(t1 + size - 1, n + 1)
        _clear(values, rows, cut, slots.other, top, s1, s2, t1, t2)
        # Splits between the tile's starts and its ends: four for all of its rows, four more, …
        for j in range(s2 + 1, t1 + 1, _SPLITS):
            for t in range(t1, t2 + 1):
                for s in range(s1, s2 + 1):
                    start = s
                    while start:
                        _split(filling, start, s, t, j, t1)
                        start = slots.other[start]
        # Then those among its ends and among its starts, which need other rows of the tile.
        for s in range(min(s2, n), s1 - 1, -1):
            for t in range(max(t1, s), t2 + 1):
                start = s
                while start:
                    for j in range(max(t1, s2) + 1, t + 1, _SPLITS):
                        _split(filling, start, s, t, j, t)
                    cut[start, t] = min(rows[start, t, END], top + 1)
                    for j in range(s + 1, min(s2, t) + 1, _SPLITS):
                        _split(filling, start, s, t, j, min(s2, t))
                    _tape(values, rows, slots, extra, top, start, s, t)
                    start = slots.other[start]


@compiled
def _clear(
    values: Numbers,
    rows: Integers,
    cut: Integers,
    other: Integers,
    top: int,
    s1: int,
    s2: int,
    t1: int,
    t2: int,
) -> None:
    """Start the rows of a tile at infinity."""
    for t in range(t1, t2 + 1):
        for s in range(s1, min(s2, t) + 1):
            start = s
            while start:
                zero, end = rows[start, t, ZERO], rows[start, t, END]
                values[zero + rows[start, t, LEAST] : zero + end] = np.inf
                cut[start, t] = min(end, top + 1)
                start = other[start]


@compiled
def _split(filling: _Filling, start: int, s: int, t: int, j0: int, last: int) -> None:
    """Lower a row by four splits from j0 on, or those up to `last`.

    The splits' rows begin and end at different slots. Between two such borders every operand is
    a piece of a row, the zeros, or the infinities.
    """
    values, rows, cut, takes, sweep, seconds, level, base, unit, top, work, costs = filling
    a, b, z = _at(start), _at(t), seconds[_at(s - 1)]
    zero, least, end = rows[a, b, _at(ZERO)], rows[a, b, _at(LEAST)], cut[a, b]
    # Seconds never rise with slots, and those of a sweep rise with j: what costs more than is
    # known costs more for all further j as well.
    cheapest = seconds[_at(j0 - 1)] - z
    if end > least and values[_at(zero + end - 1)] <= cheapest:
        end -= 1
        while end > least and values[_at(zero + end - 1)] <= cheapest:
            end -= 1
        cut[a, b] = end
    if end <= least:
        return
    m, known, need = end, -1, 0
    more = level[b] + base[a]
    for k in range(_SPLITS):
        q = _at(k)
        j = min(j0 + k, last)
        left, right, shift = _at(j), _at(j - 1), takes[a, _at(j)]
        if sweep[_at(s), left] != known:
            known = sweep[_at(s), left]
            need = (known + more) // unit
        begin = max(rows[left, b, _at(LEAST)] + shift, rows[a, right, _at(LEAST)])
        begin = max(begin, max(least, need))
        work[q] = begin
        work[_at(4) + q] = rows[left, b, _at(END)] + shift
        work[_at(8) + q] = rows[a, right, _at(END)]
        work[_at(12) + q] = rows[left, b, _at(ZERO)] - shift
        work[_at(16) + q] = rows[a, right, _at(ZERO)]
        costs[q] = seconds[right] - z
        m = min(m, begin)
    while m < end:
        stop = end
        for k in range(_SPLITS):
            q = _at(k)
            one, other = 0, 0
            if m < work[q]:
                one = other = top + 2
                stop = min(stop, work[q])
            else:
                if m < work[_at(4) + q]:
                    one = work[_at(12) + q]
                    stop = min(stop, work[_at(4) + q])
                if m < work[_at(8) + q]:
                    other = work[_at(16) + q]
                    stop = min(stop, work[_at(8) + q])
            work[_at(20) + q] = one
            work[_at(24) + q] = other
        _lower(values, zero, m, stop, work, costs)
        m = stop


@compiled
def _lower(
    values: Numbers, target: int, first: int, stop: int, work: Integers, costs: Numbers
) -> None:
    """The inner loop: target[m] = min(target[m], min of four left[m] + right[m] + cost).

    Where what is stored may be what was loaded, LLVM stores under a mask, which takes processors
    several times as long. Adding zero changes no number here, and hides that from it.
    """
    row, zero = _at(target), values.dtype.type(0)
    left0, left1, left2, left3 = _at(work[20]), _at(work[21]), _at(work[22]), _at(work[23])
    right0, right1, right2, right3 = _at(work[24]), _at(work[25]), _at(work[26]), _at(work[27])
    cost0, cost1, cost2, cost3 = costs[0], costs[1], costs[2], costs[3]
    for k in range(first, stop):
        m = _at(k)
        x0 = values[left0 + m] + values[right0 + m] + cost0
        x1 = values[left1 + m] + values[right1 + m] + cost1
        x2 = values[left2 + m] + values[right2 + m] + cost2
        x3 = values[left3 + m] + values[right3 + m] + cost3
        x0 = x1 if x1 < x0 else x0
        x2 = x3 if x3 < x2 else x2
        x0 = x2 if x2 < x0 else x0
        x1 = values[row + m] + zero
        values[row + m] = x0 if x0 < x1 else x1


def _lower_by_one(
    values: Numbers, target: int, source: int, first: int, stop: int, cost: Any
) -> None:
    """target[m] = min(target[m], source[m] + cost), stored as in `_lower`.

    Element by element: to assign a slice, numba compiles the words in which numpy complains of
    another length, which takes seconds.
    """
    row, other, zero = _at(target), _at(source), values.dtype.type(0)
    for k in range(first, stop):
        m = _at(k)
        found, known = values[other + m] + cost, values[row + m] + zero
        values[row + m] = found if found < known else known


def _lower_by_slices(
    values: Numbers, target: int, source: int, first: int, stop: int, cost: Any
) -> None:
    row = values[target + first : target + stop]
    np.minimum(row, values[source + first : source + stop] + cost, out=row)


_lower_by = compiled(_lower_by_one, interpreted=_lower_by_slices)


@compiled
def _tape(
    values: Numbers,
    rows: Integers,
    slots: Slots,
    extra: Numbers,
    top: int,
    start: int,
    s: int,
    t: int,
) -> None:
    """Lower a row by its tapings, and finish it."""
    zero, least, end = rows[start, t, ZERO], rows[start, t, LEAST], rows[start, t, END]
    last, zeros = min(end, top + 1), 0  # where the zeros lie
    for way in range(slots.first[start], slots.first[start + 1]):
        cost = values.dtype.type(extra[way])
        begin = max(least, slots.needs[way, t])
        stop = begin
        if s < t:
            rest, shift = slots.after[way], slots.tape[way]
            begin = max(begin, rows[rest, t, LEAST] + shift)
            stop = max(begin, min(last, rows[rest, t, END] + shift))
            _lower_by(values, zero, rows[rest, t, ZERO] - shift, begin, stop, cost)
        _lower_by(values, zero, zeros, stop, last, cost)
    if end == top + 2 and least <= top:
        # A slot more than there are: rounding may ask for it, and bytes never need it.
        values[zero + top + 1] = values[zero + top]


def fill_by_rows(
    values: Numbers, rows: Integers, slots: Slots, seconds: Numbers, extra: Numbers, top: int
) -> None:
    """Fill a small table as `fill` does, to the same bits, by numpy: a row and a split at a time.

    Args:
        values: The rows, to fill.
        rows: Where each row lies.
        slots: The sizes.
        seconds: Running sum of u_f by stage.
        extra: What each taping takes longer than the stage's fastest.
        top: The largest number of slots.
    """
    n, interpreted = rows.shape[1] - 2, suited(_tape, 0)
    places, takes, elapsed = rows.tolist(), slots.takes.tolist(), seconds.tolist()
    needs = slots.sweep[slots.stage] + (slots.handed + slots.up)[:, None]  # less level[t]
    for t in range(1, n + 2):
        least_swept = ((needs + slots.level[t]) // slots.unit).tolist()
        for s in range(min(t, n), 0, -1):
            start = s
            while start:
                zero, least, end = places[start][t]
                stop = min(end, top + 1)
                values[zero + least : zero + end] = np.inf
                row = values[zero + least : zero + stop]
                for j in range(s + 1, t + 1):
                    cost, shift = elapsed[j - 1] - elapsed[s - 1], takes[start][j]
                    # Numbers fall with slots, and the seconds of a sweep rise with j: what costs
                    # more than is known costs more for all further j as well.
                    if not len(row) or row[-1] <= cost:
                        row = row[: _first_within(row, cost)]
                        if not len(row):
                            break
                    left, left_least, left_end = places[j][t]
                    right, right_least, right_end = places[start][j - 1]
                    begin = max(least, least_swept[start][j], left_least + shift, right_least)
                    stop = least + len(row)
                    if begin >= stop:
                        continue
                    both = max(begin, min(stop, left_end + shift, right_end))
                    found = values[left + begin - shift : left + both - shift]
                    found = found + values[right + begin : right + both]
                    found += values.dtype.type(cost)
                    part = row[begin - least : both - least]
                    np.minimum(part, found, out=part)
                    if both < stop:  # one of them is 0 from here on, or both
                        found = np.zeros(stop - both, values.dtype)
                        one, other = min(stop, left_end + shift), min(stop, right_end)
                        if one > both:
                            found[: one - both] = values[left + both - shift : left + one - shift]
                        if other > both:
                            found[: other - both] = values[right + both : right + other]
                        found += values.dtype.type(cost)
                        part = row[both - least :]
                        np.minimum(part, found, out=part)
                interpreted(values, rows, slots, extra, top, start, s, t)
                start = int(slots.other[start])


def _first_within(row: Numbers, most: float) -> int:
    """The first place of a falling row where it is no more than a number; its length if none is."""
    return bisect_left(row, True, key=lambda x: bool(x <= most))
