"""Best-first search over what may be stored: compiled, in steps that can be interrupted.

What a position is, `pinned_moves` says. Positions are expanded in the order of their estimate (A*;
Hart, Nilsson, Raphael 1968): seconds so far, and what the rest takes at least. So the least
estimate that is still open bounds every schedule from below.
"""

from __future__ import annotations

from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt

from ..compiled import compiled
from ..progress import report
from .pinned_heap import pop, push
from .pinned_moves import NEXT_BITS, NEXT_MASK, fill_table, most_moves, moves, slot_of
from .pinned_sizes import Bytes, PinnedSizes, Seconds

# Expanded between two looks at Ctrl-C: some tenths of a second.
_EXPANSIONS = 50_000
_FIRST_POSITIONS = 1 << 14
_GOING, _FOUND, _EXHAUSTED, _FULL = 0, 1, 2, 3
# Of the counters: positions met, entries of the heap, the position that ends a schedule.
_MET, _OPEN, _GOAL = 0, 1, 2


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
        fill_table(new.table, new.keys, met)
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


@compiled
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


@compiled
def _part(problem: Problem, start: int, last: int, free: int) -> float:
    """Seconds of stages start..last at least, in so many bytes."""
    if free < 0:
        return np.inf
    extra = problem.rows[problem.offset[start] + last - start, free // problem.unit]
    seconds: float = extra + (problem.base[last] - problem.base[start - 1])
    return seconds


@compiled
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
    slot = slot_of(space.table, space.keys, key)
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
    push(space.heap_estimates, space.heap_positions, counters[_OPEN], estimate, position)
    counters[_OPEN] += 1


@compiled
def _search(problem: Problem, space: _Space, counters: Bytes, upper: float, expansions: int) -> int:
    """Expand positions, the least estimate first; stops before the space overflows."""
    most_children = most_moves(problem.sizes)
    for _ in range(expansions):
        if counters[_OPEN] == 0:
            return _EXHAUSTED
        full = counters[_MET] + most_children > len(space.keys)
        if full or counters[_OPEN] + most_children > len(space.heap_positions):
            return _FULL
        position = space.heap_positions[0]
        if not space.closed[position] and space.keys[position] & NEXT_MASK == 0:
            counters[_GOAL] = position
            return _FOUND
        pop(space.heap_estimates, space.heap_positions, counters[_OPEN])
        counters[_OPEN] -= 1
        if not space.closed[position]:
            space.closed[position] = True
            _expand(problem, space, counters, position, upper)
    return _GOING


@compiled
def _expand(problem: Problem, space: _Space, counters: Bytes, position: int, upper: float) -> None:
    """Open what one operation leads to; states are dropped only where something is too big."""
    key, seconds = space.keys[position], space.seconds[position]
    found = moves(problem.sizes, problem.beside, problem.width, key)
    tight = False
    for k in range(found.operations):
        if found.bytes[k] <= problem.budget:
            cost = seconds + found.seconds[k]
            _meet(problem, space, counters, found.keys[k], cost, position, upper)
        else:
            tight = True
    if tight:
        for k in range(found.operations, found.total):
            _meet(problem, space, counters, found.keys[k], seconds, position, upper)
