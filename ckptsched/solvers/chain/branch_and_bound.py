"""Branch and bound on the chain recurrence, in exact bytes.

A table in slots bounds every segment from below at every number of bytes. A segment with m bytes
begins with a taping or a split, each of which is bounded by its own seconds and the bounds of its
parts; parts are independent of each other once their bytes are known. So choices are tried in
the order of their bounds, those that cannot be below the best so far are left out, and what was
found of a segment with so many bytes is remembered. Where the search ends, nothing is rounded:
its schedule is the optimum of the recurrence, and proven.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np

from ...base.jit import compiled, count_steps, is_interpreted, suited
from ...base.progress import report
from .table_kernel import END, LEAST, ZERO, Integers, Numbers
from .tables import LeastMemory, Table
from .to_schedule import Outline
from .traceback_kernel import BACKWARD, DROP, SWEEP, TAPE, TURN

# Segments that are remembered, each with 56 bytes: 0.2 GB.
_MEMORY = 2**22
# Looks at choices between two chances for Ctrl-C: some hundredths of a second.
_LOOKS_AT_ONCE = 4_000_000
# The first looks are few, so that where they do nothing need be compiled. What a look takes in the
# interpreter, in steps.
_FIRST_LOOKS = 200_000
_LOOK_STEPS = 2
_INTERPRETED_STAGES = 150
# The bound rises from the table's to the seconds of the schedule at hand in so many steps. A low
# goal leaves out more, and what it proves helps with the next.
_STEPS = 8
# Sums of seconds in another order differ in their last digits.
_DIGITS = 1e-12
# State of a search: segments remembered, looks left, whether these ran out.
_USED, _LEFT, _STOPPED = range(3)
_LOW = 2**31 - 1


class _Bounds(NamedTuple):
    """The table, as `_bound` looks it up."""

    values: Numbers
    rows: Integers
    up: Integers
    unit: int
    top: int
    shrink: float
    slack: float


class _Model(NamedTuple):
    """What the search looks up, and what it remembers by segment and bytes.

    Every array that a kernel is handed takes time to compile: of `Slots` in bytes there is only
    what the search reads.
    """

    table: _Bounds
    least: Integers
    enough: Integers
    seconds: Numbers
    extra: Numbers
    stage: Integers
    takes: Integers
    sweep: Integers
    present: Integers
    """Bytes that are there all through a sweep, by start and t."""
    first: Integers
    tape: Integers
    after: Integers
    option: Integers
    needs: Integers
    keys: Integers
    bounds: Numbers
    choices: Integers
    state: Integers


@final
@dataclass(frozen=True, eq=False)
class Found:
    """What a search found out about one budget."""

    outline: Outline | None
    """The optimum of the recurrence, where it was found and is below what was at hand."""
    bound_seconds: float
    """No schedule of the recurrence is below, in seconds more than the fastest."""


def search(least: LeastMemory, table: Table, size: int, extra_seconds: float, looks: int) -> Found:
    """Look for the optimum of the recurrence in exact bytes.

    Args:
        least: Least memory in bytes.
        table: Bounds from below of the same chain, its sizes not rounded up.
        size: Bytes of the whole chain, no fewer than its least.
        extra_seconds: What the best schedule at hand takes longer than the fastest.
        looks: How many choices may be looked at.

    Returns:
        The optimum, or how far the bound has come.
    """
    n, known = len(least.sizes), table.bound(size)
    if known >= extra_seconds:
        return Found(None, extra_seconds)
    model = _model(least, table)
    scale = 1 / table.unscaled(1.0)
    low, high = known, extra_seconds
    for step in range(1, _STEPS + 1):
        goal = low + (high - low) * step / _STEPS if step < _STEPS else high
        if known >= goal:
            continue  # what a lower goal has proven
        report(f"exact search of {n} stages", (step - 1) / _STEPS)
        value, looks = _solve_in_parts(model, size, goal * scale, looks)
        if looks <= 0:
            return Found(None, known)
        if value < goal * scale:
            events = np.empty((4 * n + 2, 3), dtype=np.int64)
            written = suited(follow, n**2)(model, size, events)
            found = table.unscaled(value)
            return Found(Outline(events[:written], found), found * (1 - _DIGITS))
        known = min(max(goal, table.unscaled(value)), high) * (1 - _DIGITS)
    return Found(None, known)


def _solve_in_parts(model: _Model, size: int, goal: float, looks: int) -> tuple[float, int]:
    """Solve the whole chain, with chances for Ctrl-C; what was found lets it go on quickly.

    Returns:
        Its seconds, as `solve` gives them, and the looks that are left: 0 where it did not end.
    """
    n = model.least.shape[1] - 2
    # Segments are solved within each other, in the interpreter as deep as it allows.
    step = _LOOK_STEPS if n <= _INTERPRETED_STAGES else math.inf
    at_once = _FIRST_LOOKS
    while looks > 0 and model.state[_USED] < _most_remembered(model):
        granted = min(looks, at_once)
        model.state[_LEFT], model.state[_STOPPED] = granted, 0
        interpreted = is_interpreted(solve, step * granted)
        value = suited(solve, 0.0 if interpreted else math.inf)(model, 1, n + 1, size, goal)
        used = granted - max(int(model.state[_LEFT]), 0)
        count_steps(solve, step * used if interpreted else 0.0)
        looks -= used
        if not model.state[_STOPPED]:
            return value, max(looks, 1)
        at_once = _LOOKS_AT_ONCE
    return math.inf, 0


def _most_remembered(model: _Model) -> int:
    return suited(_most, 0.0)(model.keys)


def _model(least: LeastMemory, table: Table) -> _Model:
    relative, absolute = table.error
    exact, slots = least.slots, table.slots
    return _Model(
        table=_Bounds(
            values=table.values,
            rows=table.rows,
            up=slots.up,
            unit=slots.unit,
            top=table.top,
            shrink=math.exp(-relative),
            slack=absolute,
        ),
        least=least.least,
        enough=least.enough,
        seconds=table.seconds,
        extra=table.extra,
        stage=exact.stage,
        takes=exact.takes,
        sweep=exact.sweep,
        present=exact.handed[:, None] + exact.level,
        first=exact.first,
        tape=exact.tape,
        after=exact.after,
        option=exact.option,
        needs=exact.needs,
        keys=np.zeros((_MEMORY, 3), dtype=np.int64),
        bounds=np.zeros((_MEMORY, 2)),
        choices=np.zeros((_MEMORY, 2), dtype=np.int64),
        state=np.zeros(3, dtype=np.int64),
    )


@compiled
def _bound(table: _Bounds, start: int, t: int, m: int) -> float:
    """What E(start, t, m) is not below, by the table."""
    slot = min((m + table.up[start]) // table.unit, table.top)
    if slot < table.rows[start, t, LEAST]:
        return np.inf
    if slot >= table.rows[start, t, END]:
        return 0.0
    value = np.float64(table.values[table.rows[start, t, ZERO] + slot])
    return float(max(value * table.shrink - table.slack, 0.0))


@compiled
def _most(keys: Integers) -> int:
    """How many segments may be remembered: beyond, looking one up takes long."""
    return len(keys) * 7 // 10


@compiled
def _entry(keys: Integers, start: int, t: int, m: int) -> int:
    """Where a segment is remembered, or would be."""
    # Products of 31 bits each, so that none overflows: start and t have some 13 bits, m up to 62.
    mixed = (m & _LOW) * 0x5851F42D ^ (m >> 31) * 0x14057B7F ^ (start * 65_537 + t) * 0x2545F491
    at = ((mixed ^ mixed >> 32) & _LOW) * 0x4F1BBCDD >> 20 & (len(keys) - 1)
    while keys[at, 0] and (keys[at, 0] != start or keys[at, 1] != t or keys[at, 2] != m):
        at = (at + 1) & (len(keys) - 1)
    return at


@compiled
def solve(model: _Model, start: int, t: int, m: int, goal: float) -> float:
    """The least extra seconds of a segment in m bytes where they are below a goal.

    Returns:
        Else what they are not below, the goal or more. Where the looks ran out, which the state
        says, it means nothing.
    """
    if m < model.least[start, t]:
        return np.inf
    if goal <= 0.0 or m >= model.enough[start, t]:
        return 0.0
    at = _entry(model.keys, start, t, m)
    bound = _bound(model.table, start, t, m)
    if model.keys[at, 0]:
        if model.bounds[at, 1]:
            return float(model.bounds[at, 0])
        bound = max(bound, model.bounds[at, 0])
    if bound >= goal:
        return bound
    s = model.stage[start]
    model.state[_LEFT] -= t - s + 8
    if model.state[_LEFT] < 0 or model.state[_USED] >= _most(model.keys):
        model.state[_STOPPED] = 1
        return np.inf
    costs, choices, rest = _choices(model, start, s, t, m, goal)
    best, way, split = goal, -1, 0
    for _ in range(len(costs)):
        k = np.argmin(costs)  # the first of equal ones, so that ties go one way everywhere
        if costs[k] >= best:
            rest = min(rest, costs[k])
            break
        costs[k] = np.inf
        i, j = choices[k, 0], choices[k, 1]
        after, size, cost, other = _begun(model, start, s, m, i, j)
        part, found = best - cost - other, 0.0
        if s < t:  # what follows the taping or the sweep
            found = solve(model, after, t, size, part)
        is_known, cost = found < part, cost + found
        if j and is_known:  # and what was swept
            part = best - cost
            found = solve(model, start, j - 1, m, part)
            is_known, cost = found < part, cost + found
        elif j:
            cost += other
        if model.state[_STOPPED]:
            return np.inf
        if is_known and cost < best:
            best, way, split = cost, i, j
        else:
            rest = min(rest, cost)
    at = _entry(model.keys, start, t, m)
    if not model.keys[at, 0]:
        model.keys[at, 0], model.keys[at, 1], model.keys[at, 2] = start, t, m
        model.state[_USED] += 1
    model.bounds[at, 0], model.bounds[at, 1] = best if way >= 0 else max(goal, rest), way >= 0
    model.choices[at, 0], model.choices[at, 1] = way, split
    return float(model.bounds[at, 0])


@compiled
def _begun(
    model: _Model, start: int, s: int, m: int, way: int, j: int
) -> tuple[int, int, float, float]:
    """What follows a taping, or a sweep to a split where j is no 0.

    Returns:
        The start of what follows and its bytes, seconds so far, and a bound of what was swept.
    """
    if j == 0:
        return model.after[way], m - model.tape[way], model.extra[way], 0.0
    swept = model.seconds[j - 1] - model.seconds[s - 1]
    return j, m - model.takes[start, j], swept, _bound(model.table, start, j - 1, m)


@compiled
def _choices(
    model: _Model, start: int, s: int, t: int, m: int, goal: float
) -> tuple[Numbers, Integers, float]:
    """How a segment may begin with less than the goal.

    Returns:
        Bounds, taping or split of each, and the least bound of those left out.
    """
    count, most, rest = 0, model.first[start + 1] - model.first[start] + t - s, np.inf
    costs, choices = np.empty(most), np.empty((most, 2), np.int64)
    for way in range(model.first[start], model.first[start + 1]):
        if m < model.needs[way, t]:
            continue
        cost = model.extra[way]
        if s < t:
            after, size = model.after[way], m - model.tape[way]
            if size < model.least[after, t]:
                continue
            cost += _bound(model.table, after, t, size)
        if cost < goal:
            costs[count], choices[count, 0], choices[count, 1] = cost, way, 0
            count += 1
        else:
            rest = min(rest, cost)
    more = model.present[start, t]
    for j in range(s + 1, t + 1):
        cost = model.seconds[j - 1] - model.seconds[s - 1]
        if cost >= goal or model.sweep[s, j] + more > m:
            rest = min(rest, cost)
            break  # both rise with j
        size = m - model.takes[start, j]
        if size < model.least[j, t] or m < model.least[start, j - 1]:
            continue
        cost += _bound(model.table, j, t, size)
        if cost < goal:
            cost += _bound(model.table, start, j - 1, m)
        if cost < goal:
            costs[count], choices[count, 0], choices[count, 1] = cost, 0, j
            count += 1
        else:
            rest = min(rest, cost)
    return costs[:count], choices[:count], rest


@compiled
def follow(model: _Model, size: int, events: Integers) -> int:
    """Write out the choices that `solve` remembers, as `walk` writes them; returns their number."""
    n = model.least.shape[1] - 2
    todo = np.empty((3 * n + 6, 3), np.int64)
    todo[0, 0], todo[0, 1] = -DROP, 0
    todo[1, 0], todo[1, 1], todo[1, 2] = 1, n + 1, size
    waiting, count = 2, 0
    while waiting:
        waiting -= 1
        start, t, m = todo[waiting, 0], todo[waiting, 1], todo[waiting, 2]
        if start < 0:
            events[count, 0], events[count, 1], events[count, 2] = -start, t, 0
        elif model.stage[start] == n + 1:
            events[count, 0], events[count, 1], events[count, 2] = TURN, 0, 0
        else:
            s = model.stage[start]
            way, j = _remembered(model, start, s, t, m)
            if j:
                events[count, 0], events[count, 1], events[count, 2] = SWEEP, s, j - 1
                todo[waiting, 0], todo[waiting, 1], todo[waiting, 2] = start, j - 1, m
                todo[waiting + 1, 0], todo[waiting + 1, 1] = -DROP, j - 1
                todo[waiting + 2, 0], todo[waiting + 2, 1] = j, t
                todo[waiting + 2, 2] = m - model.takes[start, j]
                waiting += 3
            else:
                events[count, 0], events[count, 1] = TAPE, s
                events[count, 2] = model.option[way]
                todo[waiting, 0], todo[waiting, 1] = -BACKWARD, s
                waiting += 1
                if s < t:
                    todo[waiting, 0], todo[waiting, 1] = model.after[way], t
                    todo[waiting, 2] = m - model.tape[way]
                    waiting += 1
        count += 1
    return count


@compiled
def _remembered(model: _Model, start: int, s: int, t: int, m: int) -> tuple[int, int]:
    """The taping or split of a solved segment."""
    if m < model.enough[start, t]:
        at = _entry(model.keys, start, t, m)
        return model.choices[at, 0], model.choices[at, 1]
    for way in range(model.first[start], model.first[start + 1]):
        fits = m >= model.needs[way, t]
        if model.extra[way] > 0 or not fits:
            continue
        if s == t or m - model.tape[way] >= model.enough[model.after[way], t]:
            return way, 0
    return -1, 0
