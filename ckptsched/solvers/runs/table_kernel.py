"""The compiled loops of `tables`: segments inside one run, and lines of segments with one end.

Positions count the stages from a segment's first one to the end of the chain, so that the segment
that starts with X stages of a run has position end + X.

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
from .find_runs import Limits, RunSlots
from .splits_kernel import TOGETHER, best_of_some, keep_all, lower, try_some_splits, try_splits

Numbers = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


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
            lower(row, 2, values[m - tape], 1, count - 1, np.float32(0))
        if keep == 0 and m >= alone:
            keep_all(row, row, 1, count - 1, seconds)
        elif m >= keep and m >= min(alone, pair):
            least = 1 if m >= alone else 2
            most = count - 1 if m >= pair else 1
            rest = values[m - keep]
            if exact or most <= TOGETHER:
                try_splits(row, rest, row, (0, least, most, 1), 2, count, (0.0, seconds))
            else:
                try_some_splits(row, rest, row, (0, least, count, 1), (0.0, seconds))


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
            lower(row, 1, inside[(m - slots.tape[a]) // unit], 1, count, np.float32(0))
        if m >= slots.alone[a, r] and m >= slots.keep[a]:
            cost = row[0] + np.float32(slots.seconds[a])
            lower(row, 1, inside[(m - slots.keep[a]) // unit], 1, count, cost)
        least = 1 if m >= slots.cross[a, r, r, 0, 0] else 2
        most = count - 1 if m >= slots.cross[a, r, r, 0, 1] else 1
        if m >= keep and least <= most:
            rest = inside[(m - keep) // unit]
            if exact or most <= TOGETHER:
                try_splits(row, rest, row, (0, least, most, 1), 2, count, seconds)
            else:
                try_some_splits(row, rest, row, (0, least, count, 1), seconds)


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
                lower(row, start + 1, line[m - slots.tape[a]], start, count, np.float32(0))
            alone, pair = slots.alone[a, b], slots.pair[a, b]
            if keep == 0 and m >= alone:
                keep_all(row, inside, start, count, slots.seconds[a])
            elif m >= keep and m >= min(alone, pair):
                least = 1 if m >= alone else 2
                most = count if m >= pair else 1
                rest, cost = line[m - keep], (0.0, slots.seconds[a])
                if exact or most <= TOGETHER:
                    try_splits(row, rest, inside, (start, least, most, 0), 1, count, cost)
                else:
                    try_some_splits(row, rest, inside, (start, least, count, 0), cost)


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
    i = best_of_some(rest, at, left, least, most, cost)
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
