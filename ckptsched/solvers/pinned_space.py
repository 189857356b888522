"""Best-first search over what may be stored: compiled, in steps that can be interrupted.

A position says which backward is next and what is kept of every stage. It is one 64-bit number:
the next backward in the lowest bits, then `width` bits a stage, of which the lowest says whether
the state is kept, and the others which tape is, counted from 1. Positions are expanded in the
order of their estimate (A*; Hart, Nilsson, Raphael 1968): seconds so far, and what the rest takes
at least. So the least estimate that is still open bounds every schedule from below.
"""

from __future__ import annotations

from typing import Final, NamedTuple, final

import numba
import numpy as np
import numpy.typing as npt

from ..progress import report
from .pinned_sizes import Bytes, PinnedSizes, Seconds

NEXT_BITS: Final = 5
NEXT_MASK: Final = (1 << NEXT_BITS) - 1
_KEY_BITS = 62
# Expanded between two looks at Ctrl-C: some tenths of a second.
_EXPANSIONS = 50_000
_FIRST_POSITIONS = 1 << 14
_GOING, _FOUND, _EXHAUSTED, _FULL = 0, 1, 2, 3
# Of the counters: positions met, entries of the heap, the position that ends a schedule.
_MET, _OPEN, _GOAL = 0, 1, 2
_HASH = 0x9E3779B97F4A7C15 >> 1


@final
class Problem(NamedTuple):
    """What a search needs of a chain and a budget; a named tuple for compiled functions."""

    sizes: PinnedSizes
    rows: Seconds
    """Extra seconds of segments at least, by slots: `PinnedTable.rows`."""
    offset: Bytes
    """The row of (s, t) is offset[s] + t - s."""
    unit: int
    """Bytes of a slot."""
    base: Seconds
    """Seconds of stages 1..t, each run once; the loss counts at n + 1, shape (n + 2,)."""
    beside: npt.NDArray[np.bool_]
    """Whether tape i may pay beside state i, which tape i + 1 holds, shape (n + 1,)."""
    budget: int
    """Bytes, without what is there from start to end."""
    width: int
    """Bits a stage."""


class _Space(NamedTuple):
    """Positions that were met, a hash table of them, and a heap of those that are open."""

    keys: Bytes
    seconds: Seconds
    parents: npt.NDArray[np.int32]
    closed: npt.NDArray[np.bool_]
    table: npt.NDArray[np.int32]
    heap_estimates: Seconds
    heap_positions: npt.NDArray[np.int32]


def key_width(sizes: PinnedSizes) -> int | None:
    """Bits a stage in a position; None where a position would not fit 64 bits."""
    n, most_tapes = len(sizes.state) - 1, int(np.diff(sizes.first_tape[1:]).max())
    width = 1 + most_tapes.bit_length()
    return width if NEXT_BITS + n * width <= _KEY_BITS and n < NEXT_MASK else None


@final
class PinnedSearch:
    """A search that goes on until the best schedule, its absence or a limit is reached."""

    def __init__(self, problem: Problem, upper_seconds: float, most_positions: int) -> None:
        """Prepare; `run` searches.

        Args:
            problem: The chain and the budget.
            upper_seconds: Only schedules of fewer seconds are looked for; may be infinite.
            most_positions: Where to give up; a position takes some 60 bytes.
        """
        self._problem, self._upper, self._most = problem, upper_seconds, most_positions
        self._counters = np.zeros(3, dtype=np.int64)
        self._space = _new_space(min(_FIRST_POSITIONS, most_positions))
        self.is_complete = False
        start = len(problem.sizes.state)  # the loss is next, and nothing is kept
        _meet(problem, self._space, self._counters, start, 0.0, -1, upper_seconds)

    def run(self) -> list[int] | None:
        """Search.

        Returns:
            The positions of the cheapest schedule, first to last, where one takes less than
            `upper_seconds`. None where none does, or where the limit was reached: then
            `is_complete` is false.
        """
        status = _GOING
        while status == _GOING:
            status = _search(self._problem, self._space, self._counters, self._upper, _EXPANSIONS)
            share = int(self._counters[_MET]) / self._most
            report("search over all schedules", min(share, 1.0))
            if status == _FULL and len(self._space.keys) < self._most:
                self._grow()
                status = _GOING
        self.is_complete = status != _FULL
        return self._path() if status == _FOUND else None

    @property
    def lower_bound_seconds(self) -> float:
        """No schedule takes less: the least open estimate, or `upper_seconds` if that is less."""
        least = float(self._space.heap_estimates[0]) if self._counters[_OPEN] else np.inf
        return min(least, self._upper)

    @property
    def positions(self) -> int:
        """How many positions were met."""
        return int(self._counters[_MET])

    def _grow(self) -> None:
        old = self._space
        met, opened = int(self._counters[_MET]), int(self._counters[_OPEN])
        new = _new_space(min(2 * len(old.keys), self._most))
        for kept, values, count in (
            (new.keys, old.keys, met),
            (new.seconds, old.seconds, met),
            (new.parents, old.parents, met),
            (new.closed, old.closed, met),
            (new.heap_estimates, old.heap_estimates, opened),
            (new.heap_positions, old.heap_positions, opened),
        ):
            kept[:count] = values[:count]
        _fill_table(new.table, new.keys, met)
        self._space = new

    def _path(self) -> list[int]:
        keys, at = [], int(self._counters[_GOAL])
        while at >= 0:
            keys.append(int(self._space.keys[at]))
            at = int(self._space.parents[at])
        return keys[::-1]


def _new_space(positions: int) -> _Space:
    # A position whose seconds are lowered is opened again, so the heap may hold it twice.
    return _Space(
        keys=np.empty(positions, dtype=np.int64),
        seconds=np.empty(positions),
        parents=np.empty(positions, dtype=np.int32),
        closed=np.zeros(positions, dtype=np.bool_),
        table=np.full(1 << (2 * positions - 1).bit_length(), -1, dtype=np.int32),
        heap_estimates=np.empty(2 * positions),
        heap_positions=np.empty(2 * positions, dtype=np.int32),
    )


@numba.njit(cache=True)
def _slot(table: npt.NDArray[np.int32], keys: Bytes, key: int) -> int:
    """Where a position stands in the hash table, or would."""
    mask = len(table) - 1
    slot = ((key * _HASH) >> 20) & mask
    while table[slot] >= 0 and keys[table[slot]] != key:
        slot = (slot + 1) & mask
    return slot


@numba.njit(cache=True)
def _fill_table(table: npt.NDArray[np.int32], keys: Bytes, count: int) -> None:
    for position in range(count):
        table[_slot(table, keys, keys[position])] = position


@numba.njit(cache=True)
def _rest(problem: Problem, key: int) -> float:
    """Seconds that the rest takes at least: those of the parts between what is kept.

    A tape, and the state that it was made from, are there until the parts above are reversed.
    """
    sizes, width = problem.sizes, problem.width
    n = len(sizes.state) - 1
    b = key & NEXT_MASK
    fields = key >> NEXT_BITS
    seconds = 0.0
    free = problem.budget
    start, below = 1, 0
    for i in range(1, min(b, n) + 1):
        field = (fields >> ((i - 1) * width)) & ((1 << width) - 1)
        if field > 1:
            k = sizes.first_tape[i] + (field >> 1) - 1
            seconds += sizes.backward_seconds[k]
            free -= sizes.tape[k]
            if below & 1:
                free -= sizes.state[i - 1]
            start = i + 1
        elif field:
            seconds += _part(problem, start, i, free)
            start = i + 1
        below = field
    return seconds + _part(problem, start, b, free) if start <= b else seconds


@numba.njit(cache=True)
def _part(problem: Problem, start: int, last: int, free: int) -> float:
    """Seconds of stages start..last at least, in so many bytes."""
    if free < 0:
        return np.inf
    extra = problem.rows[problem.offset[start] + last - start, free // problem.unit]
    seconds: float = extra + (problem.base[last] - problem.base[start - 1])
    return seconds


@numba.njit(cache=True)
def _meet(
    problem: Problem,
    space: _Space,
    counters: Bytes,
    key: int,
    seconds: float,
    parent: int,
    upper: float,
) -> None:
    """Open a position, unless it was met with no more seconds or its estimate is too high."""
    slot = _slot(space.table, space.keys, key)
    position = space.table[slot]
    if position >= 0 and space.seconds[position] <= seconds:
        return
    estimate = seconds + _rest(problem, key)
    if estimate == np.inf or estimate >= upper:
        return
    if position < 0:
        position = counters[_MET]
        counters[_MET] += 1
        space.table[slot] = position
        space.keys[position] = key
    space.seconds[position] = seconds
    space.parents[position] = parent
    space.closed[position] = False
    at = counters[_OPEN]
    counters[_OPEN] += 1
    estimates, positions = space.heap_estimates, space.heap_positions
    while at > 0 and estimates[(at - 1) >> 1] > estimate:
        estimates[at] = estimates[(at - 1) >> 1]
        positions[at] = positions[(at - 1) >> 1]
        at = (at - 1) >> 1
    estimates[at] = estimate
    positions[at] = position


@numba.njit(cache=True)
def _take(space: _Space, counters: Bytes) -> None:
    """Remove the first entry of the heap."""
    estimates, positions = space.heap_estimates, space.heap_positions
    counters[_OPEN] -= 1
    count = counters[_OPEN]
    estimate, position = estimates[count], positions[count]
    at = 0
    while 2 * at + 1 < count:
        child = 2 * at + 1
        if child + 1 < count and estimates[child + 1] < estimates[child]:
            child += 1
        if estimates[child] >= estimate:
            break
        estimates[at] = estimates[child]
        positions[at] = positions[child]
        at = child
    estimates[at] = estimate
    positions[at] = position


@numba.njit(cache=True)
def _search(problem: Problem, space: _Space, counters: Bytes, upper: float, expansions: int) -> int:
    """Expand positions, the least estimate first; stops before the space overflows."""
    sizes = problem.sizes
    n = len(sizes.state) - 1
    most_children = 2 * n + len(sizes.tape) + 1
    for _ in range(expansions):
        if counters[_OPEN] == 0:
            return _EXHAUSTED
        full = counters[_MET] + most_children > len(space.keys)
        if full or counters[_OPEN] + most_children > len(space.heap_positions):
            return _FULL
        position = space.heap_positions[0]
        if not space.closed[position]:
            if space.keys[position] & NEXT_MASK == 0:
                counters[_GOAL] = position
                return _FOUND
            space.closed[position] = True
            _take(space, counters)
            _expand(problem, space, counters, position, upper)
        else:
            _take(space, counters)
    return _GOING


@numba.njit(cache=True)
def _expand(problem: Problem, space: _Space, counters: Bytes, position: int, upper: float) -> None:
    """Open what one operation leads to; states are dropped only where something is too big."""
    sizes, width, budget = problem.sizes, problem.width, problem.budget
    n = len(sizes.state) - 1
    key, seconds = space.keys[position], space.seconds[position]
    b = key & NEXT_MASK
    mask = (1 << width) - 1
    fields = np.zeros(n + 2, dtype=np.int64)
    fields[0] = 1
    level = sizes.level[b]
    for i in range(1, n + 1):
        field = (key >> (NEXT_BITS + (i - 1) * width)) & mask
        fields[i] = field
        if field & 1:
            level += sizes.state[i]
        if field > 1:
            level += sizes.tape[sizes.first_tape[i] + (field >> 1) - 1]
    tight = _finish(problem, space, counters, position, upper, fields, level)
    for i in range(1, min(b, n) + 1):
        at = NEXT_BITS + (i - 1) * width
        held = fields[i + 1] > 1
        if fields[i - 1] == 0 or fields[i] > 1:
            continue
        if fields[i] == 0 and i < b:
            if level + sizes.forward[i] <= budget:
                then = key | (1 << at)
                cost = seconds + sizes.forward_seconds[i]
                _meet(problem, space, counters, then, cost, position, upper)
            else:
                tight = True
        if fields[i] and held and not problem.beside[i]:
            continue
        before = level
        then = key
        if fields[i] and not held:
            before -= sizes.state[i]
            then ^= 1 << at
        for k in range(sizes.first_tape[i], sizes.first_tape[i + 1]):
            if before + sizes.taped[k] <= budget:
                number = k - sizes.first_tape[i] + 1
                cost = seconds + sizes.taped_seconds[k]
                taped = then | (number << (at + 1))
                _meet(problem, space, counters, taped, cost, position, upper)
            else:
                tight = True
    if tight:
        for i in range(1, min(b, n) + 1):
            if fields[i] & 1 and fields[i + 1] < 2:
                then = key ^ (1 << (NEXT_BITS + (i - 1) * width))
                _meet(problem, space, counters, then, seconds, position, upper)


@numba.njit(cache=True)
def _finish(
    problem: Problem,
    space: _Space,
    counters: Bytes,
    position: int,
    upper: float,
    fields: Bytes,
    level: int,
) -> bool:
    """Open what the loss or the next backward leads to; whether it lacked memory."""
    sizes, width = problem.sizes, problem.width
    n = len(sizes.state) - 1
    key, seconds = space.keys[position], space.seconds[position]
    b = key & NEXT_MASK
    if b == n + 1:
        if fields[n] == 0:
            return False
        if level + sizes.turn > problem.budget:
            return True
        then = key - 1
        if fields[n] & 1:
            then ^= 1 << (NEXT_BITS + (n - 1) * width)
        cost = seconds + sizes.base_seconds[n + 1]
        _meet(problem, space, counters, then, cost, position, upper)
        return False
    if fields[b] < 2 or fields[b - 1] == 0:
        return False
    k = sizes.first_tape[b] + (fields[b] >> 1) - 1
    tape = sizes.tape[k]
    if level - sizes.level[b] - tape + sizes.backward[k] > problem.budget:
        return True
    then = (key & ((1 << (NEXT_BITS + (b - 1) * width)) - 1)) - 1
    if b > 1 and fields[b - 1] & 1:
        then ^= 1 << (NEXT_BITS + (b - 2) * width)
    cost = seconds + sizes.backward_seconds[k]
    _meet(problem, space, counters, then, cost, position, upper)
    return False
