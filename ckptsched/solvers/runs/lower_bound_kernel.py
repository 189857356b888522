"""The compiled loops of `lower_bound`: least reduced cost of segments by the runs they span.

level[a, b, m] is the least reduced cost of a segment from run a to run b in m slots, when each of
its stages is run k times without tape before, which is what its level k says: see `lower_bound`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...base.jit import compiled

Indices = npt.NDArray[np.int64]
Seconds = npt.NDArray[np.float64]

# From so many earlier runs on, runs whose stages do not pay any more are taken as short as can be.
_OFTEN = 32
# Which way a segment starts, where its best one is looked up again.
_NONE, _LEAF, _TAPE, _TAPE_ON, _SPLIT, _SPLIT_IN = range(6)


class Relaxed(NamedTuple):
    """A chain's runs in slots, sizes rounded down; R is the loss."""

    stages: Indices
    """Stages, by run."""
    seconds: Seconds
    """Seconds of a forward."""
    keep: Indices
    """Slots that a kept state takes."""
    tape: Indices
    """Slots that a kept tape takes."""
    taped: Indices
    """taped[a, b]: least slots of the first stage with tape."""
    sweep: Indices
    """sweep[a, c, b]: least slots of a sweep from run a that ends in run c."""
    turn: int
    """Least slots of the loss."""
    keep_part: Seconds
    """Slots that a kept state takes, not rounded, where it is a small part of a slot's multiple
    and checkpoints of the run are counted by the slots that they fill; else 0."""
    tape_part: Seconds
    """The same of tapes."""


class Tally(NamedTuple):
    """How often segments occur in the cheapest relaxed schedule."""

    now: Any
    """With k earlier runs, shape (R + 1, R + 1, slots + 1); used up."""
    then: Any
    """With k + 1, to fill."""
    used: Seconds
    """Stages by run, to add to."""


@compiled
def fill(level: Any, above: Any, relaxed: Relaxed, prices: Seconds, k: int, is_top: bool) -> None:
    """Least reduced costs for stages with k earlier runs.

    Args:
        level: To fill, shape (R + 1, R + 1, slots + 1).
        above: The same for k + 1 earlier runs.
        relaxed: The sizes.
        prices: What a stage of each run pays.
        k: Earlier runs.
        is_top: Whether no stage of a long run pays any more.
    """
    number = len(relaxed.stages)
    shares = _shares(above, relaxed)
    for b in range(number + 1):
        pays = False
        for a in range(b, -1, -1):
            row = level[a, b]
            if a == number:
                row[: min(relaxed.turn, len(row))] = np.inf
                row[relaxed.turn :] = 0
                continue
            pays = pays or prices[a] > k * relaxed.seconds[a]
            if is_top or (k > _OFTEN and not pays):
                _fewest_stages(row, relaxed, prices, k, a, b)
            else:
                _exits(row, level, above, relaxed, prices, k, a, b)
                if relaxed.stages[a] > 1 and relaxed.keep_part[a] > 0:
                    net = k * relaxed.seconds[a] - prices[a]
                    _stay_by_parts(row, shares[a], relaxed, net, a, b)
                elif relaxed.stages[a] > 1:
                    _stay(row, above[a, a], relaxed, prices, k, a, b)


@compiled
def _fewest_stages(row: Any, relaxed: Relaxed, prices: Seconds, k: int, a: int, b: int) -> None:
    """Where no stage of a long run pays any more: one of each run."""
    number = len(relaxed.stages)
    total, need = 0.0, relaxed.turn if b == number else 0
    for r in range(a, min(b, number - 1) + 1):
        total += k * relaxed.seconds[r] - prices[r]
        need = max(need, relaxed.taped[r, b if b == number else r])
    row[:] = np.inf
    row[need:] = total


@compiled
def _exits(
    row: Any,
    level: Any,
    above: Any,
    relaxed: Relaxed,
    prices: Seconds,
    k: int,
    a: int,
    b: int,
) -> None:
    """Starts after which the segment goes on in another run, or ends."""
    number = len(relaxed.stages)
    net = k * relaxed.seconds[a] - prices[a]
    row[:] = np.inf
    if a == b:
        row[relaxed.taped[a, a] :] = net
    else:
        tape = relaxed.tape[a]
        _lower(row, level[a + 1, b], max(relaxed.taped[a, b], tape), tape, net)
    for c in range(a, min(b, number - 1) + 1):
        left, keep = above[a, c], relaxed.keep[c]
        low = max(relaxed.sweep[a, c, b], keep)
        if c < b:
            _lower_by_sum(row, left, level[c + 1, b], low, keep)
        if c > a and relaxed.stages[c] > 1:
            _lower_by_sum(row, left, level[c, b], low, keep)


@compiled
def _lower(row: Any, rest: Any, low: int, shift: int, cost: float) -> None:
    """Lower a row from some slots on to what follows a taping."""
    for m in range(low, len(row)):
        found = cost + rest[m - shift]
        known = row[m] + 0.0  # see chain/table_kernel._lower
        row[m] = found if found < known else known


@compiled
def _lower_by_sum(row: Any, left: Any, rest: Any, low: int, shift: int) -> None:
    """Lower a row from some slots on to two parts of a split."""
    for m in range(low, len(row)):
        found = left[m] + rest[m - shift]
        known = row[m] + 0.0
        row[m] = found if found < known else known


@compiled
def _stay(row: Any, left: Any, relaxed: Relaxed, prices: Seconds, k: int, a: int, b: int) -> None:
    """Starts after which the segment goes on in the run of its first stage."""
    net = k * relaxed.seconds[a] - prices[a]
    keep, tape = relaxed.keep[a], relaxed.tape[a]
    split, taped = max(relaxed.sweep[a, a, b], keep), max(relaxed.taped[a, b], tape)
    for m in range(min(split, taped), len(row)):
        best = row[m]
        if m >= split:
            best = min(best, left[m] + row[m - keep])
        if m >= taped:
            best = min(best, net + row[m - tape])
        row[m] = best


@compiled
def _shares(above: Any, relaxed: Relaxed) -> Any:
    """Cost of a slot's worth of checkpoints by run and slots, where they are counted so."""
    number, top = len(relaxed.stages), above.shape[2] - 1
    shares = np.empty((number, top + 1))
    for a in range(number):
        part = relaxed.keep_part[a]
        if relaxed.stages[a] > 1 and part > 0:
            more, left, row = int(np.ceil(part)), above[a, a], shares[a]
            for m in range(top + 1):
                row[m] = left[min(m + more, top)] / part
    return shares


@compiled
def _stay_by_parts(row: Any, shares: Any, relaxed: Relaxed, net: float, a: int, b: int) -> None:
    """The same where checkpoints are counted by the slots that they fill: `_density`, for all m."""
    top = len(row) - 1
    kept = max(0, relaxed.sweep[a, a, b] - int(np.ceil(relaxed.keep_part[a])))
    taped = max(0, relaxed.taped[a, b] - int(np.ceil(relaxed.tape_part[a])))
    kept = kept if relaxed.sweep[a, a, b] <= top else top + 1
    taped = taped if relaxed.taped[a, b] <= top else top + 1
    tape = min(0.0, net / relaxed.tape_part[a])
    before = np.inf
    for m in range(top + 1):
        gain = tape if m >= taped else 0.0
        if m >= kept:
            gain = min(gain, shares[m])
        before = gain + min(row[m], before)
        row[m] = before


@compiled
def _density(
    left: Any, relaxed: Relaxed, net: float, a: int, b: int, m: int
) -> tuple[float, bool, int]:
    """The least cost of a slot's worth of checkpoints or tapes, which it is, and its slots.

    A state that takes a part of slot m was kept when there were up to its size more.
    """
    top = len(left) - 1
    above = min(m + int(np.ceil(relaxed.keep_part[a])), top)
    best, is_tape = np.inf, False
    if above >= relaxed.sweep[a, a, b]:
        best = left[above] / relaxed.keep_part[a]
    higher = min(m + int(np.ceil(relaxed.tape_part[a])), top)
    if higher >= relaxed.taped[a, b] and net / relaxed.tape_part[a] < best:
        best, is_tape = net / relaxed.tape_part[a], True
    return best, is_tape, above


@compiled
def stages_used(
    level: Any,
    above: Any,
    relaxed: Relaxed,
    prices: Seconds,
    tally: Tally,
    k: int,
    is_top: bool,
) -> bool:
    """How many stages of each run the cheapest segments with k earlier runs have.

    Args:
        level: Least reduced costs for k earlier runs.
        above: The same for k + 1.
        relaxed: The sizes.
        prices: What a stage of each run pays.
        tally: How often segments occur.
        k: Earlier runs.
        is_top: Whether no stage of a long run pays any more.

    Returns:
        Whether there are segments with more earlier runs.
    """
    number, goes_on, now = len(relaxed.stages), False, tally.now
    tally.then[:] = 0
    for b in range(number, -1, -1):
        for a in range(min(b, number - 1) + 1):
            pays = False
            for r in range(a, min(b, number - 1) + 1):
                pays = pays or prices[r] > k * relaxed.seconds[r]
            fewest = is_top or (k > _OFTEN and not pays)
            for m in range(now.shape[2] - 1, -1, -1):
                times = now[a, b, m]
                if times == 0:
                    continue
                if fewest:
                    for r in range(a, min(b, number - 1) + 1):
                        tally.used[r] += times
                elif _follow(level, above, relaxed, prices, tally, k, a, b, m):
                    goes_on = True
    return goes_on


@compiled
def _follow(
    level: Any,
    above: Any,
    relaxed: Relaxed,
    prices: Seconds,
    tally: Tally,
    k: int,
    a: int,
    b: int,
    m: int,
) -> bool:
    """Hand on how often a segment occurs to those that it consists of."""
    now, then, used = tally.now, tally.then, tally.used
    times, goes_on = now[a, b, m], False
    net = k * relaxed.seconds[a] - prices[a]
    if relaxed.stages[a] > 1 and relaxed.keep_part[a] > 0:
        cost, is_tape, slots = _density(above[a, a], relaxed, net, a, b, m)
        if cost < 0 and is_tape:
            used[a] += times / relaxed.tape_part[a]
        elif cost < 0:
            then[a, a, slots] += times / relaxed.keep_part[a]
            goes_on = True
        if m and level[a, b, m] == min(0.0, cost) + level[a, b, m - 1]:
            now[a, b, m - 1] += times
            return goes_on
    kind, c = _best(level, above, relaxed, net, a, b, m)
    if kind in (_LEAF, _TAPE, _TAPE_ON):
        used[a] += times
        if kind == _TAPE:
            now[a + 1, b, m - relaxed.tape[a]] += times
        elif kind == _TAPE_ON:
            now[a, b, m - relaxed.tape[a]] += times
    elif kind != _NONE:
        then[a, c, m] += times
        goes_on = True
        follows = c if kind == _SPLIT_IN else c + 1
        now[follows, b, m - relaxed.keep[c]] += times
    return goes_on


@compiled
def _best(
    level: Any, above: Any, relaxed: Relaxed, net: float, a: int, b: int, m: int
) -> tuple[int, int]:
    """The best start of a segment, and the run in which it splits."""
    number = len(relaxed.stages)
    best, kind, run = np.inf, _NONE, a
    stays = relaxed.stages[a] > 1 and relaxed.keep_part[a] == 0
    if a == b and m >= relaxed.taped[a, a]:
        best, kind = net, _LEAF
    tape = relaxed.tape[a]
    if m >= max(relaxed.taped[a, b], tape):
        if a < b and net + level[a + 1, b, m - tape] < best:
            best, kind = net + level[a + 1, b, m - tape], _TAPE
        if stays and net + level[a, b, m - tape] < best:
            best, kind = net + level[a, b, m - tape], _TAPE_ON
    for c in range(a, min(b, number - 1) + 1):
        keep = relaxed.keep[c]
        if m < max(keep, relaxed.sweep[a, c, b]):
            continue
        left = above[a, c, m]
        if c < b and left + level[c + 1, b, m - keep] < best:
            best, kind, run = left + level[c + 1, b, m - keep], _SPLIT, c
        inside = stays if c == a else relaxed.stages[c] > 1
        if inside and left + level[c, b, m - keep] < best:
            best, kind, run = left + level[c, b, m - keep], _SPLIT_IN, c
    return kind, run
