"""The innermost loops of `table_kernel`: a row of segments is lowered by all splits, or by some.

Rows hold all positions (or lengths) at one number of slots, because the inner operation is then a
(min,+) step between two short rows:

    row[X] = min(row[X], cost(l) + rest[X - l])     for many X at once,

at some ten additions a nanosecond. Which l are worth a try is known from the X before.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...base.jit import compiled

_at = np.uintp  # see chain/table_kernel

# Segments whose best splits are looked for together.
TOGETHER = 64
# How far from the best split of the segments before that is looked for.
_WINDOW = 16
# Splits that share one pass over a row.
_AT_ONCE = 4
# Of all splits so many are looked at where the best may be anywhere.
_SAMPLES = 96


@compiled
def keep_all(row: Any, inside: Any, start: int, count: int, seconds: float) -> None:
    """States that take nothing: each stage is run once more at most."""
    cost = inside[1] + np.float32(seconds)
    for x in range(start + 1, start + count + 1):
        row[x] = min(row[x], row[x - 1] + cost)


@compiled
def try_some_splits(row: Any, rest: Any, inside: Any, parts: Any, cost: Any) -> None:
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
            try_splits(row, rest, inside, (start, low, high, shorter), x + 1, end, cost)
        best = _best(rest, start + end, inside, low, high, cost)
        other = best_of_some(rest, start + end, inside, least, longest, cost)
        best = max(least, _better(rest, start + end, inside, best, other, cost))
        if best < low or best > high or not shorter:
            low, high = min(before, best) - _WINDOW, max(before, best) + _WINDOW
            low, high = max(least, low), min(high, longest)
            try_splits(row, rest, inside, (start, low, high, shorter), x + 1, end, cost)


@compiled
def try_splits(
    row: Any, rest: Any, inside: Any, parts: Any, low: int, high: int, cost: Any
) -> None:
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
        lower(row, start + low, rest, start + low - i, high + 1 - low, swept)


@compiled
def lower(row: Any, to: int, rest: Any, of: int, width: int, cost: Any) -> None:
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
def best_of_some(rest: Any, at: int, inside: Any, first: Any, last: Any, cost: Any) -> Any:
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
