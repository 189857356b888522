"""A recurrence over more than memory-persistent schedules: checkpoints may slide.

A state x_l at which a segment (s, t) is split need not stay until Backward(l + 1). When the
stages above some c have been reversed from it, the stages l + 1..z may be run, x_z kept and x_l
dropped: a small early state serves while much else is kept, a larger one when there is room.

    E(s, t, m) = min of  E(s + 1, t, m - w_t[s])                        where tape s fits
                         u(s, l) + V(s, l, t, m)                        where s..l can be swept
    V(s, l, c, m) = min of
        E(l + 1, c, m - w_a[l]) + E(s, l, m)                            x_l stays to the end
        u(l + 1, z) + V(s, z, c, m)                                     it slides to x_z
        u(l + 1, d) + E(d + 1, c, m - w_a[l] - w_a[d]) + V(s, l, d, m)  d + 1..c are reversed from
                                                                        x_d, and x_l stays so far

with s <= l < t and l < z, d < c. E counts extra seconds over running every stage once, u(a, b)
the seconds of stages a..b without tape. With the first line of V alone this is the recurrence of
the memory-persistent optimum (Beaumont et al., RR-9302), so E is never above that.
"""

from __future__ import annotations

from typing import Final, NamedTuple, final

import numpy as np
import numpy.typing as npt

from ..compiled import compiled
from ..progress import report
from .pinned_sizes import Bytes, PinnedSizes, Seconds

# Ends of segments filled between two looks at Ctrl-C.
_ENDS = 16


class _Slots(NamedTuple):
    """Sizes, and how they are counted; a named tuple for compiled functions."""

    sizes: PinnedSizes
    unit: int
    """Bytes of a slot; sizes are rounded to the nearest."""
    seconds: Seconds
    """Seconds of stages 1..i without tape, shape (n + 1,)."""
    offset: Bytes
    """The row of (s, t) is offset[s] + t - s."""
    longest: int
    """Checkpoints slide in segments of at most so many stages, and in those from stage 1."""


@final
class SlidingTable:
    """E for all segments and all numbers of slots up to `top`."""

    def __init__(
        self, sizes: PinnedSizes, top: int, unit: int = 1, longest: int | None = None
    ) -> None:
        """Fill the table: n**4 / 12 * top additions, 8 n**2 * top bytes.

        Args:
            sizes: The chain's sizes in bytes.
            top: Largest number of slots of interest.
            unit: Bytes of a slot.
            longest: Checkpoints slide only in segments of at most so many stages, and in those
                from stage 1; in all by default. Takes n * longest**3 / 3 * top additions.
        """
        n = len(sizes.state) - 1
        self.n: Final = n
        self.unit: Final = unit
        offset = np.cumsum([0, 0, *range(n + 1, 0, -1)])
        seconds = np.cumsum(sizes.forward_seconds)
        self._slots = _Slots(sizes, unit, seconds, offset, n + 1 if longest is None else longest)
        self._rows = np.full((int(offset[n + 1]) + 1, top + 1), np.inf)
        self._rows[-1, (sizes.turn + unit // 2) // unit :] = 0.0
        after = np.empty_like(self._rows)
        for s in range(n, 0, -1):
            report(f"sliding checkpoints of {n} stages", 1 - (s / n) ** 4)
            for first in range(s, n + 2, _ENDS):
                _fill(s, first, min(first + _ENDS, n + 2), self._slots, self._rows, after)

    @property
    def extra_seconds(self) -> Seconds:
        """E of the whole chain by slots."""
        row: Seconds = self._rows[self._slots.offset[1] + self.n]
        return row

    def choose(self, s: int, t: int, m: int) -> Choices:
        """How the best schedule of a segment with m slots begins and goes on."""
        after = np.full((t - s, t - s + 1), np.inf)
        choice = np.zeros((t - s, t - s + 1), dtype=np.int64)
        best = _choose(s, t, m, self._slots, self._rows, after, choice)
        return Choices(s=s, first=int(best), choice=choice)

    def option(self, s: int, tape: int) -> int:
        """Which of the tapes of stage s a tape is, by number."""
        return tape - int(self._slots.sizes.first_tape[s])

    def rest(self, m: int, *, tape: int | None = None, states: tuple[int, ...] = ()) -> int:
        """Slots that are left of m beside a tape, by number, or states."""
        sizes, unit = self._slots.sizes, self._slots.unit
        kept = [int(sizes.state[i]) for i in states]
        kept += [] if tape is None else [int(sizes.tape[tape])]
        return m - sum((size + unit // 2) // unit for size in kept)


@final
class Choices(NamedTuple):
    """Of a segment (s, t)."""

    s: int
    """Its first stage."""
    first: int
    """The state at which it is split; where negative, -1 - k: it begins with tape k."""
    choice: npt.NDArray[np.int64]
    """By l - s and c - s: 0 where x_l stays, z where it slides, -d where d + 1..c go first."""

    def after(self, start: int, c: int) -> int:
        """What comes with state `start` kept and Backward(c) next."""
        return int(self.choice[start - self.s, c - self.s])


@compiled
def _round(size: int, unit: int) -> int:
    return (size + unit // 2) // unit


@compiled
def _lower(
    row: Seconds, first: int, below: Seconds, shift: int, rest: Seconds, more: float
) -> None:
    """row[m] = min(row[m], below[m - shift] + rest[m] + more) for m from `first` on."""
    first = max(first, shift)
    while first < len(row) and (np.isinf(below[first - shift]) or np.isinf(rest[first])):
        first += 1
    for m in range(first, len(row)):
        value = below[m - shift] + rest[m] + more
        row[m] = value if value < row[m] else row[m]


@compiled
def _fill(s: int, first: int, end: int, slots: _Slots, rows: Seconds, after: Seconds) -> None:
    """E(s, t) and V(s, l, t) for t = first..end-1; V is kept for one s at a time."""
    sizes, unit, seconds, offset, longest = slots
    for t in range(first, end):
        row = rows[offset[s] + t - s]
        for k in range(sizes.first_tape[s], sizes.first_tape[s + 1]):
            need = _round(max(sizes.level[t] + sizes.taped[k], sizes.backward[k]), unit)
            if s == t:
                for m in range(need, len(row)):
                    row[m] = min(row[m], sizes.tape_seconds[k])
            else:
                w = _round(sizes.tape[k], unit)
                rest = rows[offset[s + 1] + t - s - 1]
                for m in range(max(need, w), len(row)):
                    row[m] = min(row[m], rest[m - w] + sizes.tape_seconds[k])
        for start in range(t - 1, s - 1, -1):
            best = after[offset[start] + t - start]
            best[:] = np.inf
            w = _round(sizes.state[start], unit)
            above = rows[offset[start + 1] + t - start - 1]
            _lower(best, 0, above, w, rows[offset[s] + start - s], 0.0)
            if t - s < longest or s == 1:
                _slide(start, t, slots, rows, after, best)
        need = 0
        for start in range(s, t):
            before = sizes.state[start - 1] if start > s else 0
            need = max(need, sizes.level[t] + sizes.forward[start] + before)
            swept = seconds[start] - seconds[s - 1]
            best = after[offset[start] + t - start]
            for m in range(_round(need, unit), len(row)):
                value = best[m] + swept
                row[m] = value if value < row[m] else row[m]


@compiled
def _slide(start: int, c: int, slots: _Slots, rows: Seconds, after: Seconds, best: Seconds) -> None:
    """Lower V(s, start, c) by what else may come than that the state stays.

    A slide pays only towards a larger state: for a smaller one, that one might have been kept.
    """
    sizes, unit, seconds, offset, _ = slots
    kept, level = sizes.state[start], sizes.level[c]
    w = _round(kept, unit)
    moving = serving = 0
    larger = False
    for z in range(start + 1, c):
        alone = level + sizes.forward[z]
        moving = max(moving, alone + sizes.state[z - 1])
        serving = max(serving, alone + kept + (sizes.state[z - 1] if z > start + 1 else 0))
        again = seconds[z] - seconds[start]
        if larger:
            taken = w + _round(sizes.state[z], unit)
            above, below = rows[offset[z + 1] + c - z - 1], after[offset[start] + z - start]
            _lower(best, _round(serving, unit), above, taken, below, again)
        if sizes.state[z] > kept:
            larger = True
            then = after[offset[z] + c - z]
            for m in range(_round(moving, unit), len(best)):
                value = then[m] + again
                best[m] = value if value < best[m] else best[m]


@compiled
def _at(rows: Seconds, row: int, m: int) -> float:
    return rows[row, m] if m >= 0 else np.inf


@compiled
def _choose(
    s: int,
    t: int,
    m: int,
    slots: _Slots,
    rows: Seconds,
    after: Seconds,
    choice: npt.NDArray[np.int64],
) -> int:
    """What `_fill` found best at m: V(s, l, c) in after[l - s, c - s], and how it comes about."""
    sizes, unit, seconds, offset, longest = slots
    for c in range(s + 1, t + 1):
        for start in range(c - 1, s - 1, -1):
            above = _at(
                rows, offset[start + 1] + c - start - 1, m - _round(sizes.state[start], unit)
            )
            after[start - s, c - s] = above + rows[offset[s] + start - s, m]
            if c - s < longest or s == 1:
                _choose_slide(s, start, c, m, slots, rows, after, choice)
    best, first = np.inf, 0
    need = 0
    for start in range(s, t):
        before = sizes.state[start - 1] if start > s else 0
        need = max(need, sizes.level[t] + sizes.forward[start] + before)
        value = after[start - s, t - s] + (seconds[start] - seconds[s - 1])
        if m >= _round(need, unit) and value < best:
            best, first = value, start
    for k in range(sizes.first_tape[s], sizes.first_tape[s + 1]):
        need = _round(max(sizes.level[t] + sizes.taped[k], sizes.backward[k]), unit)
        value = sizes.tape_seconds[k]
        if s < t:
            value += _at(rows, offset[s + 1] + t - s - 1, m - _round(sizes.tape[k], unit))
        if m >= need and value <= best:
            best, first = value, -1 - k
    return first


@compiled
def _choose_slide(
    s: int,
    start: int,
    c: int,
    m: int,
    slots: _Slots,
    rows: Seconds,
    after: Seconds,
    choice: npt.NDArray[np.int64],
) -> None:
    """What `_slide` found best at m."""
    sizes, unit, seconds, offset, _ = slots
    kept, level = sizes.state[start], sizes.level[c]
    moving = serving = 0
    larger = False
    for z in range(start + 1, c):
        alone = level + sizes.forward[z]
        moving = max(moving, alone + sizes.state[z - 1])
        serving = max(serving, alone + kept + (sizes.state[z - 1] if z > start + 1 else 0))
        again = seconds[z] - seconds[start]
        best = after[start - s, c - s]
        if larger and m >= _round(serving, unit):
            left = m - _round(kept, unit) - _round(sizes.state[z], unit)
            value = _at(rows, offset[z + 1] + c - z - 1, left) + after[start - s, z - s] + again
            if value < best:
                after[start - s, c - s], choice[start - s, c - s] = value, -z
        best = after[start - s, c - s]
        if sizes.state[z] > kept:
            larger = True
            value = after[z - s, c - s] + again
            if m >= _round(moving, unit) and value < best:
                after[start - s, c - s], choice[start - s, c - s] = value, z
