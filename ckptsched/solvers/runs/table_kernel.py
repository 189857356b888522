"""The compiled loops of `tables`: segments inside one run, and lines of segments with one end.

Positions count the stages from a segment's first one to the end of the chain, so that the segment
that starts with X stages of a run has position end + X. Rows hold all positions (or lengths) at one
number of slots, because the inner operation is then a (min,+) step between two short rows:

    row[X] = min(row[X], cost(l) + rest[X - l])     for many X at once,

at some ten additions a nanosecond. Which l are worth a try is known from the X before.

Indices: a segment begins in run a and ends in run b (R is the loss) with the stage of that number
in the run; c is the run of a split between them; m counts slots; k is a line, p a point of the
mesh. cross[a, c, b, x, y] are the least slots of a sweep from run a that ends in run c, in a
segment that ends in run b: x is 1 where it runs more than one stage of run a, y the same of run c.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...base.jit import compiled
from .find_runs import RunSlots

Numbers = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
_at = np.uintp  # see chain/table_kernel

# Segments whose best splits are looked for together.
TOGETHER = 64
# How far from the best split of the segments before that is looked for.
_WINDOW = 16
# Splits that share one pass over a row.
_AT_ONCE = 4
# Of all splits so many are looked at where the best may be anywhere.
_SAMPLES = 96
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


class Entries(NamedTuple):
    """Extra seconds of a single stage and the first stages of the run after it, by their number."""

    values: Numbers
    """Tables in a row; E of run r's first l stages and the stage before in m slots is
    values[zero[r] + m * (count[r] + 1) + l]."""
    zero: Indices
    """By run; -1 where no single stage is before it, or it is one itself."""


class Mesh(NamedTuple):
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
def fill_in_run(
    values: Any, count: int, limits: Limits, seconds: float, exact: bool, first: int, last: int
) -> None:
    """Extra seconds of l equal stages in m slots, for all l and first..last slots m.

    Args:
        values: To fill, shape (slots + 1, count + 1).
        count: Stages.
        limits: The run's sizes.
        seconds: Seconds of one forward.
        exact: Try every split, which takes count**2 / 2 additions a row.
        first: Least slots to fill; rows below are filled.
        last: Most slots to fill.
    """
    keep, tape, taped, alone, pair = limits
    for m in range(first, last + 1):
        row = values[m]
        row[:] = np.inf
        row[0] = 0
        if m < taped:
            continue
        row[1] = 0
        if m >= tape:
            _lower(row, 2, values[m - tape], 1, count - 1, np.float32(0))
        if keep == 0 and m >= alone:
            _keep_all(row, row, 1, count - 1, seconds)
        elif m >= keep and m >= min(alone, pair):
            least = 1 if m >= alone else 2
            most = count - 1 if m >= pair else 1
            rest = values[m - keep]
            if exact or most <= TOGETHER:
                _push(row, rest, row, (0, least, most, 1), 2, count, (0.0, seconds))
            else:
                _split(row, rest, row, (0, least, count, 1), (0.0, seconds))


@compiled
def fill_entry(
    values: Any, slots: RunSlots, inside: Any, unit: int, r: int, exact: bool, first: int, last: int
) -> None:
    """Extra seconds of a single stage and the first l stages of the run after it.

    Args:
        values: To fill, shape (slots + 1, count + 1).
        slots: The sizes.
        inside: Extra seconds inside the run, a row for `unit` slots.
        unit: Slots that a row of `inside` stands for.
        r: The run.
        exact: Try every split.
        first: Least slots to fill; rows below are filled.
        last: Most slots to fill.
    """
    a, count = r - 1, slots.stages[r]
    keep, seconds = slots.keep[r], (slots.seconds[a], slots.seconds[r])
    for m in range(first, last + 1):
        row = values[m]
        row[:] = np.inf
        if m >= slots.taped[a, a]:
            row[0] = 0
        if m >= slots.taped[a, r] and m >= slots.tape[a]:
            _lower(row, 1, inside[(m - slots.tape[a]) // unit], 1, count, np.float32(0))
        if m >= slots.alone[a, r] and m >= slots.keep[a]:
            cost = row[0] + np.float32(slots.seconds[a])
            _lower(row, 1, inside[(m - slots.keep[a]) // unit], 1, count, cost)
        least = 1 if m >= slots.cross[a, r, r, 0, 0] else 2
        most = count - 1 if m >= slots.cross[a, r, r, 0, 1] else 1
        if m >= keep and least <= most:
            rest = inside[(m - keep) // unit]
            if exact or most <= TOGETHER:
                _push(row, rest, row, (0, least, most, 1), 2, count, seconds)
            else:
                _split(row, rest, row, (0, least, count, 1), seconds)


@compiled
def fill_line(
    line: Numbers,
    slots: RunSlots,
    rows: InRun,
    entries: Entries,
    mesh: Mesh,
    crossing: Numbers,
    end: Any,
    low: int,
    exact: bool,
    first: int,
    last: int,
) -> None:
    """Extra seconds of the segments with one end, for all starts and first..last slots.

    Args:
        line: To fill, by slots and position, shape (slots + 1, positions + 1).
        slots: The sizes.
        rows: Segments inside runs.
        entries: Segments from the stage before a run into it.
        mesh: Ends and starts of segments of several runs.
        crossing: Lines with earlier ends at the mesh's starts: see `Mesh.zero`.
        end: Run of the last stage and its number in the run; R and 0 for the loss.
        low: First run of interest.
        exact: Try every split in the run of the first stage.
        first: Least slots to fill; rows below are filled.
        last: Most slots to fill.
    """
    b, stage = end
    number = len(slots.stages)
    top = line.shape[1] - 1
    for m in range(first, last + 1):
        row = line[m]
        row[:] = np.inf
        _own_run(row, slots, rows, entries, b, stage, m)
        for a in range(min(b, number) - 1, low - 1, -1):
            _cross(line, slots, mesh, crossing, a, b, stage, m)
            if a + 1 < b and a + 1 < number and entries.zero[a + 1] >= 0:
                _enter(line, slots, entries, a, b, m)
            start, keep = slots.end[a], slots.keep[a]
            count = min(slots.stages[a], top - start)
            width = slots.stages[a] + 1
            zero = rows.zero[a] + (m // rows.unit[a]) * width
            inside = rows.values[zero : zero + width]
            if m >= slots.taped[a, b] and m >= slots.tape[a]:
                _lower(row, start + 1, line[m - slots.tape[a]], start, count, np.float32(0))
            alone, pair = slots.alone[a, b], slots.pair[a, b]
            if keep == 0 and m >= alone:
                _keep_all(row, inside, start, count, slots.seconds[a])
            elif m >= keep and m >= min(alone, pair):
                least = 1 if m >= alone else 2
                most = count if m >= pair else 1
                rest, cost = line[m - keep], (0.0, slots.seconds[a])
                if exact or most <= TOGETHER:
                    _push(row, rest, inside, (start, least, most, 0), 1, count, cost)
                else:
                    _split(row, rest, inside, (start, least, count, 0), cost)


@compiled
def _own_run(
    row: Any, slots: RunSlots, rows: InRun, entries: Entries, b: int, stage: int, m: int
) -> None:
    """Segments inside the run of the end and from the stage before, or the loss alone."""
    if b == len(slots.stages):
        if m >= slots.turn:
            row[0] = 0
        return
    start = slots.end[b] + slots.stages[b] - stage
    zero = rows.zero[b] + (m // rows.unit[b]) * (slots.stages[b] + 1)
    for x in range(min(stage, len(row) - 1 - start) + 1):
        row[start + x] = rows.values[zero + x]
    if entries.zero[b] >= 0 and slots.end[b - 1] + 1 < len(row):
        at = entries.zero[b] + m * (slots.stages[b] + 1) + stage
        row[slots.end[b - 1] + 1] = entries.values[at]


@compiled
def _enter(line: Any, slots: RunSlots, entries: Entries, a: int, b: int, m: int) -> None:
    """Splits in the run after a single stage, which that stage's segment starts with."""
    c, place = a + 1, slots.end[a] + 1
    keep = slots.keep[c]
    least = 1 if m >= slots.cross[a, c, b, 0, 0] else 2
    most = slots.stages[c] if m >= slots.cross[a, c, b, 0, 1] else 1
    if place >= line.shape[1] or m < keep or least > most:
        return
    zero = entries.zero[c] + m * (slots.stages[c] + 1)
    left = entries.values[zero : zero + slots.stages[c] + 1]
    cost = (slots.seconds[a], slots.seconds[c])
    at, rest = slots.end[c] + slots.stages[c], line[m - keep]
    i = _best_of_some(rest, at, left, least, most, cost)
    if i > 0:
        found = left[i] + rest[at - i] + np.float32(cost[0] + cost[1] * i)
        line[m, place] = min(line[m, place], found)


@compiled
def _cross(
    line: Any, slots: RunSlots, mesh: Mesh, crossing: Any, a: int, b: int, stage: int, m: int
) -> None:
    """Splits in a later run than the first stage's, for the starts of the mesh in run a."""
    row, number = line[m], len(slots.stages)
    first, last = mesh.point_of[a], mesh.point_of[a + 1]
    while last > first and mesh.place[last - 1] >= line.shape[1]:
        last -= 1
    if first == last:
        return
    for c in range(a + 1, min(b, number - 1) + 1):
        keep = slots.keep[c]
        for k in range(mesh.line_of[c], mesh.line_of[c + 1]):
            own = mesh.stage[k]
            if c == b and own >= stage:
                break
            y = 1 if own > 1 else 0
            if m < keep or m < slots.cross[a, c, b, 0, y]:
                break
            split = slots.end[c] + slots.stages[c] - own
            rest = line[m - keep, split]
            if rest == np.inf or first < mesh.least[k]:
                continue
            left = mesh.zero[k] + m * (mesh.point_of[c + 1] - mesh.least[k]) - mesh.least[k]
            swept = slots.elapsed[split]
            for p in range(first, last):
                at = mesh.place[p]
                if m < slots.cross[a, c, b, 1, y] and at > slots.end[a] + 1:
                    break
                found = np.float32(slots.elapsed[at] - swept) + crossing[left + p] + rest
                row[at] = min(row[at], found)
    if b < number and m >= slots.cross[a, b, b, 1, 1]:
        _peel(row, slots, mesh, crossing, (b, stage), m, first, last)


@compiled
def _peel(
    row: Any,
    slots: RunSlots,
    mesh: Mesh,
    crossing: Any,
    end: Any,
    m: int,
    first: int,
    last: int,
) -> None:
    """The stages after the mesh's end before this one, each swept to from the start and reversed.

    What splits at the last stage come to: no split needs less.
    """
    b, stage = end
    k = mesh.line_of[b]
    while k + 1 < mesh.line_of[b + 1] and mesh.stage[k + 1] < stage:
        k += 1
    own, run, keep = mesh.stage[k], b, slots.keep[b]
    if own >= stage or first < mesh.least[k]:  # down to the end of the run before
        k, own, run = mesh.line_of[b] - 1, 0, b - 1
        keep = max(keep, slots.keep[run])
    if m < keep + slots.taped[b, b]:
        return
    left = mesh.zero[k] + m * (mesh.point_of[run + 1] - mesh.least[k]) - mesh.least[k]
    peeled = stage - own
    seconds = slots.seconds[b] * (peeled * (peeled - 1) / 2)
    swept = slots.elapsed[slots.end[b] + slots.stages[b] - own]
    for p in range(first, last):
        at = mesh.place[p]
        found = np.float32(seconds + peeled * (slots.elapsed[at] - swept)) + crossing[left + p]
        row[at] = min(row[at], found)


@compiled
def _keep_all(row: Any, inside: Any, start: int, count: int, seconds: float) -> None:
    """States that take nothing: each stage is run once more at most."""
    cost = inside[1] + np.float32(seconds)
    for x in range(start + 1, start + count + 1):
        row[x] = min(row[x], row[x - 1] + cost)


@compiled
def _split(row: Any, rest: Any, inside: Any, parts: Any, cost: Any) -> None:
    """Splits near the best split of segments that are a little shorter.

    The best left part hardly ever shrinks as segments grow, nor grows by more than they do. Where
    it jumps, a look at some of all splits finds it.

    Args:
        row: To lower: segments by position.
        rest: What follows the left part, with as much less as a state takes.
        inside: Left parts; the row itself for segments inside one run.
        parts: Position after the run, fewest stages of a left part, stages of the longest segment,
            and how many stages a left part is shorter at least than the segment.
        cost: Seconds of the sweep over a left part: those of no stage, and of one more.
    """
    start, least, count, shorter = parts
    best = least
    for x in range(0, count, TOGETHER):
        end = min(x + TOGETHER, count)
        longest, before = end - shorter, best
        low, high = max(least, best - _WINDOW), min(best + TOGETHER + _WINDOW, longest)
        if shorter:  # what is looked at must be final
            _push(row, rest, inside, (start, low, high, shorter), x + 1, end, cost)
        best = _best(rest, start + end, inside, low, high, cost)
        other = _best_of_some(rest, start + end, inside, least, longest, cost)
        best = max(least, _better(rest, start + end, inside, best, other, cost))
        if best < low or best > high or not shorter:
            low, high = min(before, best) - _WINDOW, max(before, best) + _WINDOW
            low, high = max(least, low), min(high, longest)
            _push(row, rest, inside, (start, low, high, shorter), x + 1, end, cost)


@compiled
def _push(row: Any, rest: Any, inside: Any, parts: Any, low: int, high: int, cost: Any) -> None:
    """Lower segments of low..high stages by splits, the shortest left part first.

    Args:
        row: To lower.
        rest: What follows the left part.
        inside: Left parts; those of the row itself are final when their turn comes.
        parts: Position after the run, fewest and most stages of a left part, and how many stages
            it is shorter at least than the segment.
        low: Fewest stages of a segment in the run.
        high: Most of them.
        cost: Seconds of the sweep over a left part: those of no stage, and of one more.
    """
    start, least, most, shorter = parts
    i = least
    while i + _AT_ONCE - 1 <= most:
        # Four splits share one pass over the segments that all of them are of; of shorter ones
        # first, as left parts of the row itself must be final.
        together = max(low, i + _AT_ONCE - 1 + shorter)
        first = _swept(inside, cost, i)
        _push_one(row, rest, start, i, max(low, i + shorter), together - 1, first)
        second = _swept(inside, cost, i + 1)
        _push_one(row, rest, start, i + 1, max(low, i + 1 + shorter), together - 1, second)
        third = _swept(inside, cost, i + 2)
        _push_one(row, rest, start, i + 2, max(low, i + 2 + shorter), together - 1, third)
        costs = first, second, third, _swept(inside, cost, i + 3)
        if min(min(first, second), min(third, costs[3])) < np.inf:
            to, width = start + together, high + 1 - together
            _lower_by_four(row, to, rest, to - i, width, costs)
        i += _AT_ONCE
    while i <= most:
        _push_one(row, rest, start, i, max(low, i + shorter), high, _swept(inside, cost, i))
        i += 1


@compiled
def _swept(inside: Any, cost: Any, i: int) -> Any:
    """Seconds of a left part of i stages and of the sweep over it."""
    return inside[i] + np.float32(cost[0] + cost[1] * i)


@compiled
def _push_one(row: Any, rest: Any, start: int, i: int, low: int, high: int, swept: Any) -> None:
    """Lower segments of low..high stages by the split after i of them."""
    if swept < np.inf:
        _lower(row, start + low, rest, start + low - i, high + 1 - low, swept)


@compiled
def _lower(row: Any, to: int, rest: Any, of: int, width: int, cost: Any) -> None:
    """Lower a part of a row to a part of another plus a cost, where that is less."""
    if width > 0:
        target, source = _at(to), _at(of)
        zero = np.float32(0)
        for x in range(_at(width)):
            found = cost + rest[source + x]
            known = row[target + x] + zero  # see chain/table_kernel._lower
            row[target + x] = found if found < known else known


@compiled
def _lower_by_four(row: Any, to: int, rest: Any, of: int, width: int, costs: Any) -> None:
    """The same by four parts, each of which begins a number before the last, and their costs."""
    if width > 0:
        target, zero = _at(to), np.float32(0)
        source0, source1, source2, source3 = _at(of), _at(of - 1), _at(of - 2), _at(of - 3)
        cost0, cost1, cost2, cost3 = costs
        for x in range(_at(width)):
            x0 = cost0 + rest[source0 + x]
            x1 = cost1 + rest[source1 + x]
            x2 = cost2 + rest[source2 + x]
            x3 = cost3 + rest[source3 + x]
            x0 = x1 if x1 < x0 else x0
            x2 = x3 if x3 < x2 else x2
            x0 = x2 if x2 < x0 else x0
            known = row[target + x] + zero
            row[target + x] = x0 if x0 < known else known


@compiled
def _best(rest: Any, at: int, inside: Any, first: Any, last: Any, cost: Any) -> Any:
    """The left part of first..last stages that is best at one position; 0 where none fits."""
    best, length = np.float32(np.inf), np.int64(0)
    unit, position = np.float32(cost[1]), _at(at)
    for i in range(_at(first), _at(max(first, last + 1))):
        found = inside[i] + unit * np.float32(i) + rest[position - i]
        if found < best:
            best, length = found, np.int64(i)
    return length


@compiled
def _best_of_some(rest: Any, at: int, inside: Any, first: Any, last: Any, cost: Any) -> Any:
    """The same, near the best of evenly spaced ones."""
    step = (last - first) // _SAMPLES
    if step <= 1:
        return _best(rest, at, inside, first, last, cost)
    best, length = np.float32(np.inf), np.int64(0)
    for k in range(_SAMPLES + 1):
        i = first + k * step
        found = inside[i] + np.float32(cost[1] * i) + rest[at - i]
        if found < best:
            best, length = found, np.int64(i)
    low, high = max(first, length - step), min(last, length + step)
    return _best(rest, at, inside, low, high, cost) if length else length


@compiled
def _better(rest: Any, at: int, inside: Any, one: Any, other: Any, cost: Any) -> Any:
    """The better of two left parts, of which 0 is none."""
    if one <= 0 or other <= 0:
        return max(one, other)
    gain = inside[one] - inside[other] + rest[at - one] - rest[at - other]
    return other if gain + cost[1] * (one - other) > 0 else one


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
            operations[written] = 5 | (stage - 1) << 32
            written += 1
    return written
