"""The compiled loops of `run_table`: segments inside one run, and lines of segments with one end.

Positions count the stages from a segment's first one to the end of the chain, so that the segment
that starts with X stages of a run has position end + X. Rows hold all positions (or lengths) at one
number of slots, because the inner operation is then a (min,+) step between two short rows:

    row[X] = min(row[X], cost(l) + shorter[X - l])     for all X at once,

at some 30 additions a nanosecond. Which l are worth a try for which X is taken from the row before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from .chain_kernel import compiled
from .run_structure import RunSlots

Numbers = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
_at = numba.uintp  # see chain_kernel

_INFINITY = np.float32(np.inf)
# Every so many positions the best split is looked up, and every so many rows among all splits.
SPACING = 64
_RENEWAL = 16
# How far from the best splits of its neighbours that of a position is looked for.
_WINDOW = 48
_SLACK = 8
# What a row of the lowering's stack asks for, in place of a number of stages.
_DROP, _BACKWARD = -1, -2


# Of one run: slots of a kept state, of a kept tape; least slots for a stage with tape, for a sweep
# of one stage, and for a longer one.
Limits = tuple[int, int, int, int, int]


class InRun(NamedTuple):
    """Extra seconds of segments inside one run, by length: a table for each run."""

    values: Numbers
    """Tables in a row; E of run r, length l and m slots is values[zero[r] + (m // unit[r]) *
    (count[r] + 1) + l]."""
    zero: Indices
    unit: Indices
    """A common divisor of all slots of the run."""


class Grid(NamedTuple):
    """The ends that segments of several runs have, and the starts that end in another run."""

    line_of: Indices
    """First line of each run; run r has the lines line_of[r] to line_of[r + 1] - 1."""
    stage: Indices
    """By line: the number of its last stage within the run, ascending."""
    point_of: Indices
    """First point of each run."""
    place: Indices
    """By point: the position of its segment, ascending within a run."""
    least: Indices
    """By line: its first point; left parts with its end start there or later."""
    zero: Indices
    """By line: its numbers lie from zero[k] on, by slots, then by point from least[k] to the last
    of its run."""


@compiled
def fill_in_run(values: Any, count: int, limits: Limits, seconds: float) -> None:
    """Extra seconds of l equal stages in m slots, for all l and m, by trying every split.

    Args:
        values: To fill, shape (slots + 1, count + 1).
        count: Stages.
        limits: The run's sizes.
        seconds: Seconds of one forward.
    """
    keep, tape, taped, alone, pair = limits
    for m in range(values.shape[0]):
        row = values[m]
        row[:] = np.inf
        row[0] = 0
        if m < taped:
            continue
        row[1] = 0
        if m >= tape:
            before = values[m - tape]
            for x in range(2, count + 1):
                row[x] = before[x - 1]
        if keep == 0 and m >= alone:  # keeping every state is best
            for x in range(2, count + 1):
                row[x] = min(row[x], row[x - 1] + row.dtype.type(seconds))
        elif keep and m >= keep:
            rest = values[m - keep]
            for i in range(1, count):
                cost = row.dtype.type(seconds * i) + row[i]
                if m >= (alone if i == 1 else pair) and cost < np.inf:
                    _lower(row, i + 1, rest, 1, count - i, cost)


@compiled
def fill_line(
    line: Numbers,
    slots: RunSlots,
    rows: InRun,
    grid: Grid,
    crossing: Numbers,
    anchors: Indices,
    end: Any,
    low: int,
    first: int,
    last: int,
) -> None:
    """Extra seconds of the segments with one end, for all starts and first..last slots.

    Args:
        line: To fill, by slots and position, shape (slots + 1, positions + 1).
        slots: The sizes.
        rows: Segments inside runs.
        grid: Ends and starts of segments of several runs.
        crossing: Lines with earlier ends at the grid's starts: see `Grid.zero`.
        anchors: Best splits of the row before, shape (R, ...); -1 where none is known.
        end: Run of the last stage and its number in the run; R and 0 for the loss.
        low: First run of interest.
        first: Least slots to fill; rows below are filled.
        last: Most slots to fill.
    """
    b, stage = end
    number = len(slots.stages)
    top = line.shape[1] - 1
    for m in range(first, last + 1):
        row = line[m]
        row[:] = _INFINITY
        _own_run(row, slots, rows, b, stage, m)
        for a in range(min(b, number) - 1, low - 1, -1):
            _cross(line, slots, grid, crossing, a, b, stage, m)
            start = slots.end[a]
            count = min(slots.stages[a], top - start)
            width = slots.stages[a] + 1
            zero = rows.zero[a] + (m // rows.unit[a]) * width
            inside = rows.values[zero : zero + width]
            _tape(line, slots, a, b, m, count)
            if slots.keep[a] == 0:
                if m >= slots.alone[a, b]:
                    for x in range(start + 1, start + count + 1):
                        found = row[x - 1] + inside[1] + np.float32(slots.seconds[a])
                        row[x] = min(row[x], found)
            elif m >= slots.keep[a] and m >= slots.alone[a, b]:
                most = count if m >= slots.pair[a, b] else 1
                seconds = slots.seconds[a]
                rest = line[m - slots.keep[a]]
                renew = m % _RENEWAL == 0
                _split(row, rest, inside, start, count, most, seconds, anchors[a], renew)


@compiled
def _own_run(row: Any, slots: RunSlots, rows: InRun, b: int, stage: int, m: int) -> None:
    """Segments inside the run of the end, or the loss alone."""
    if b == len(slots.stages):
        if m >= slots.turn:
            row[0] = 0
        return
    start = slots.end[b] + slots.stages[b] - stage
    zero = rows.zero[b] + (m // rows.unit[b]) * (slots.stages[b] + 1)
    for x in range(min(stage, len(row) - 1 - start) + 1):
        row[start + x] = rows.values[zero + x]


@compiled
def _tape(line: Any, slots: RunSlots, a: int, b: int, m: int, count: int) -> None:
    """The first stage with tape, and what follows in what is left."""
    if m >= slots.taped[a, b] and m >= slots.tape[a]:
        row, rest, start = line[m], line[m - slots.tape[a]], slots.end[a]
        _lower(row, start + 1, rest, start, count, np.float32(0))


@compiled
def _cross(
    line: Any, slots: RunSlots, grid: Grid, crossing: Any, a: int, b: int, stage: int, m: int
) -> None:
    """Splits in a later run than the first stage's, for the starts of the grid in run a."""
    row, number = line[m], len(slots.stages)
    first, last = grid.point_of[a], grid.point_of[a + 1]
    while last > first and grid.place[last - 1] >= line.shape[1]:
        last -= 1
    if first == last:
        return
    for c in range(a + 1, min(b, number - 1) + 1):
        keep = slots.keep[c]
        for k in range(grid.line_of[c], grid.line_of[c + 1]):
            own = grid.stage[k]
            if c == b and own >= stage:
                break
            y = 1 if own > 1 else 0
            if m < keep or m < slots.cross[a, c, b, 0, y]:
                break
            split = slots.end[c] + slots.stages[c] - own
            rest = line[m - keep, split]
            if rest == np.inf:
                continue
            if first < grid.least[k]:
                continue
            left = grid.zero[k] + m * (grid.point_of[c + 1] - grid.least[k]) - grid.least[k]
            swept = slots.elapsed[split]
            for p in range(first, last):
                at = grid.place[p]
                if m < slots.cross[a, c, b, 1, y] and at > slots.end[a] + 1:
                    break
                found = np.float32(slots.elapsed[at] - swept) + crossing[left + p] + rest
                row[at] = min(row[at], found)
    if b < number and m >= slots.cross[a, b, b, 1, 1]:
        _peel(row, slots, grid, crossing, b, stage, m, first, last)


@compiled
def _peel(
    row: Any,
    slots: RunSlots,
    grid: Grid,
    crossing: Any,
    b: int,
    stage: int,
    m: int,
    first: int,
    last: int,
) -> None:
    """The stages after the grid's end before this one, each swept to from the start and reversed.

    What splits at the last stage come to: no split needs less.
    """
    k = grid.line_of[b]
    while k + 1 < grid.line_of[b + 1] and grid.stage[k + 1] < stage:
        k += 1
    own = grid.stage[k]
    keep = slots.keep[b]
    if own >= stage or first < grid.least[k]:  # down to the end of the run before
        k, own = grid.line_of[b] - 1, 0
        keep = max(keep, slots.keep[b - 1])
    if m < keep + slots.taped[b, b]:
        return
    run = b if own else b - 1
    left = grid.zero[k] + m * (grid.point_of[run + 1] - grid.least[k]) - grid.least[k]
    peeled = stage - own
    seconds = slots.seconds[b] * (peeled * (peeled - 1) / 2)
    swept = slots.elapsed[slots.end[b] + slots.stages[b] - own]
    for p in range(first, last):
        at = grid.place[p]
        found = np.float32(seconds + peeled * (slots.elapsed[at] - swept)) + crossing[left + p]
        row[at] = min(row[at], found)


@compiled
def _split(
    row: Any,
    rest: Any,
    inside: Any,
    start: int,
    count: int,
    most: int,
    seconds: float,
    anchors: Any,
    renew: bool,
) -> None:
    """The first l stages of a run as the left part: splits near the best of the neighbours.

    Exact where no more than `SPACING` lengths are to be tried. Else the best length is looked up
    at anchors, which are `SPACING` positions apart; it hardly ever falls as segments grow, so that
    between two anchors the lengths from the one's to the other's are tried, and some more.
    """
    if most <= SPACING:
        _push(row, rest, inside, start, 1, most, 1, count, seconds)
        return
    blocks = -(-count // SPACING)
    for k in range(blocks):
        x = min((k + 1) * SPACING, count)
        lo, hi = 1, x
        if not renew and anchors[k] > 0:
            lo, hi = max(1, anchors[k] - _WINDOW), min(x, anchors[k] + _WINDOW)
        anchors[k] = _best(rest, start + x, inside, lo, hi, seconds)
    _widen(anchors, blocks)
    low, high = 0, 0  # blocks whose positions may have a left part of i stages
    for i in range(max(1, anchors[blocks]), min(count, anchors[2 * blocks - 1 + blocks]) + 1):
        while anchors[2 * blocks + low] < i:
            low += 1
        while high + 1 < blocks and anchors[blocks + high + 1] <= i:
            high += 1
        x = min((high + 1) * SPACING, count)
        _push(row, rest, inside, start, i, i, low * SPACING + 1, x, seconds)


@compiled
def _best(rest: Any, at: int, inside: Any, first: int, last: int, seconds: float) -> int:
    """The left part of first..last stages that is best at one position; 0 where none fits."""
    best, length = _INFINITY, 0
    unit, position = np.float32(seconds), _at(at)
    for i in range(_at(first), _at(last + 1)):
        found = inside[i] + unit * np.float32(i) + rest[position - i]
        if found < best:
            best, length = found, i
    return length


@compiled
def _widen(anchors: Any, blocks: int) -> None:
    """From best splits at anchors to the least and the largest in each block, never falling."""
    known, most = 1, 1
    for k in range(blocks):
        best = anchors[k] if anchors[k] > 0 else known
        anchors[blocks + k] = min(known, best) - _SLACK
        most = max(most, max(known, best) + _SLACK)
        anchors[2 * blocks + k] = most
        known = best
    for k in range(blocks - 2, -1, -1):
        anchors[blocks + k] = min(anchors[blocks + k], anchors[blocks + k + 1])


@compiled
def _push(
    row: Any,
    rest: Any,
    inside: Any,
    start: int,
    first: int,
    last: int,
    low: int,
    high: int,
    seconds: float,
) -> None:
    """Lower row[start + low..start + high] by left parts of first..last stages."""
    for i in range(first, last + 1):
        cost = inside[i] + np.float32(seconds * i)
        if cost < np.inf:
            x = max(low, i)
            _lower(row, start + x, rest, start + x - i, high + 1 - x, cost)


@compiled
def _lower(row: Any, to: int, rest: Any, of: int, width: int, cost: Any) -> None:
    """Lower a part of a row to a part of another plus a cost, where that is less."""
    if width > 0:
        target, source = _at(to), _at(of)
        for x in range(_at(width)):
            found = cost + rest[source + x]
            known = row[target + x]
            row[target + x] = found if found < known else known


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
    todo[0] = (0, length, m)
    depth, written = 1, 0
    while depth:
        depth -= 1
        before, count, free = todo[depth]
        if count == _DROP:
            operations[written] = 5 | before << 32
            written += 1
            continue
        if count == _BACKWARD:
            operations[written] = 3 | before << 32
            written += 1
            continue
        split = 0
        if count > 1:
            split = _split_in_run(values, count, free, limits, seconds)
        if split == 0:
            operations[written] = 1 | (before + 1) << 32
            written += 1
            todo[depth] = (before + 1, _BACKWARD, 0)
            depth += 1
            if count > 1:
                todo[depth] = (before + 1, count - 1, free - tape)
                depth += 1
            continue
        written = _sweep(operations, written, before + 1, before + split)
        todo[depth] = (before, split, free)
        todo[depth + 1] = (before + split, _DROP, 0)
        todo[depth + 2] = (before + split, count - split, free - keep)
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
def _sweep(operations: Any, written: int, first: int, last: int) -> int:
    """Write out runs of stages first..last that keep the last state alone."""
    for stage in range(first, last + 1):
        operations[written] = stage << 32
        written += 1
        if stage > first:
            operations[written] = 5 | (stage - 1) << 32
            written += 1
    return written
