"""The least bytes in which any pinned schedule of a small chain fits: a compiled search.

A bottleneck shortest path (Pollack 1960): of all ways to the end, the one whose largest operation
is least. The search goes as deep as it can within a limit of bytes; what needs more waits in a
heap, and where nothing else is left the limit rises to the least of that. So each position is
expanded once, and the limit is a lower bound at any time.
"""

from __future__ import annotations

from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt

from ..compiled import compiled
from ..progress import report
from .pinned_bound import least_bytes_of_segments
from .pinned_heap import pop, push
from .pinned_moves import (
    NEXT_BITS,
    NEXT_MASK,
    fill_table,
    key_width,
    most_moves,
    moves,
    slot_of,
    tapes_beside_states,
)
from .pinned_sizes import Bytes, PinnedSizes

# Expanded between two looks at Ctrl-C: some tenths of a second.
_EXPANSIONS = 50_000
_FIRST_POSITIONS = 1 << 14
_GOING, _DONE, _FULL = 0, 1, 2
# Of the counters: positions met, those that can be expanded, those that wait, and the limit.
_MET, _OPEN, _WAITING, _LIMIT = 0, 1, 2, 3


class _Problem(NamedTuple):
    sizes: PinnedSizes
    beside: npt.NDArray[np.bool_]
    width: int
    least: Bytes
    """Bytes that the stages s..t need at least by themselves, shape (n + 2, n + 2)."""
    most: int
    """Bytes that are known to suffice."""


class _Space(NamedTuple):
    keys: Bytes
    needs: Bytes
    """Bytes that a position, and what comes after it, takes at least, on the best way to it."""
    table: npt.NDArray[np.int32]
    stack: npt.NDArray[np.int32]
    heap_needs: Bytes
    heap: npt.NDArray[np.int32]


@final
class LeastSearch:
    """Looks for the least bytes, up to a number of positions."""

    def __init__(
        self, sizes: PinnedSizes, lower_bytes: int, most_bytes: int, most_positions: int
    ) -> None:
        """Prepare; `run` searches.

        Args:
            sizes: The chain's sizes, whose positions fit 64 bits.
            lower_bytes: No schedule takes less.
            most_bytes: Some schedule takes so many; both with what is there from start to end.
            most_positions: Where to give up; a position takes some 30 bytes.
        """
        width = key_width(sizes)
        assert width is not None, "the caller has asked before"
        self._fixed, self._most_positions = sizes.fixed, most_positions
        self._problem = _Problem(
            sizes=sizes,
            beside=tapes_beside_states(sizes),
            width=width,
            least=least_bytes_of_segments(sizes, np.zeros_like(sizes.level)),
            most=most_bytes - sizes.fixed,
        )
        self._counters = np.zeros(4, dtype=np.int64)
        self._counters[_LIMIT] = lower_bytes - sizes.fixed
        self._space = _new_space(min(_FIRST_POSITIONS, most_positions))
        start = len(sizes.state)  # the loss is next, and nothing is kept
        _meet(self._problem, self._space, self._counters, start, 0)

    def run(self) -> int:
        """The least bytes; where the positions do not suffice, those that were known to."""
        status = _GOING
        while status == _GOING:
            status = _search(self._problem, self._space, self._counters, _EXPANSIONS)
            share = int(self._counters[_MET]) / self._most_positions
            report("search for the least budget", min(share, 1.0))
            if status == _FULL and len(self._space.keys) < self._most_positions:
                self._grow()
                status = _GOING
        least = self._counters[_LIMIT] if status == _DONE else self._problem.most
        return int(least) + self._fixed

    def _grow(self) -> None:
        old, met = self._space, int(self._counters[_MET])
        new = _new_space(min(2 * len(old.keys), self._most_positions))
        opened, waiting = int(self._counters[_OPEN]), int(self._counters[_WAITING])
        for kept, values, count in (
            (new.keys, old.keys, met),
            (new.needs, old.needs, met),
            (new.stack, old.stack, opened),
            (new.heap_needs, old.heap_needs, waiting),
            (new.heap, old.heap, waiting),
        ):
            kept[:count] = values[:count]
        fill_table(new.table, new.keys, met)
        self._space = new


def _new_space(positions: int) -> _Space:
    # A position that waits may wait with less once more, so the heap may hold it twice.
    return _Space(
        keys=np.empty(positions, dtype=np.int64),
        needs=np.empty(positions, dtype=np.int64),
        table=np.full(1 << (2 * positions - 1).bit_length(), -1, dtype=np.int32),
        stack=np.empty(positions, dtype=np.int32),
        heap_needs=np.empty(2 * positions, dtype=np.int64),
        heap=np.empty(2 * positions, dtype=np.int32),
    )


@compiled
def _search(problem: _Problem, space: _Space, counters: Bytes, expansions: int) -> int:
    """Expand positions within the limit, which rises where it must."""
    sizes = problem.sizes
    room = most_moves(sizes)
    for _ in range(expansions):
        if counters[_OPEN] == 0 and not _raise_limit(space, counters):
            counters[_LIMIT] = problem.most  # nothing else takes less
            return _DONE
        met, waiting = counters[_MET] + room, counters[_WAITING] + room
        if met > len(space.keys) or waiting > len(space.heap):
            return _FULL
        counters[_OPEN] -= 1
        key = space.keys[space.stack[counters[_OPEN]]]
        if key & NEXT_MASK == 0:
            return _DONE
        found = moves(sizes, problem.beside, problem.width, key)
        limit, last = counters[_LIMIT], found.operations
        for k in range(found.operations):
            if found.bytes[k] > limit:
                last = found.total  # drops may help
        for k in range(found.operations, last):
            _meet(problem, space, counters, found.keys[k], 0)
        # What is opened last is expanded first: a backward, and then the highest run.
        for k in range(found.operations):
            _meet(problem, space, counters, found.keys[k], found.bytes[k])
    return _GOING


@compiled
def _meet(problem: _Problem, space: _Space, counters: Bytes, key: int, need: int) -> None:
    """Open a position, or have it wait, unless it was met with no more bytes."""
    need = max(need, _rest(problem, key), counters[_LIMIT])
    if need >= problem.most:
        return
    slot = slot_of(space.table, space.keys, key)
    position = space.table[slot]
    if position < 0:
        position = counters[_MET]
        counters[_MET] += 1
        space.table[slot] = position
        space.keys[position] = key
    elif space.needs[position] <= need:
        return
    space.needs[position] = need
    if need <= counters[_LIMIT]:
        space.stack[counters[_OPEN]] = position
        counters[_OPEN] += 1
        return
    push(space.heap_needs, space.heap, counters[_WAITING], need, position)
    counters[_WAITING] += 1


@compiled
def _rest(problem: _Problem, key: int) -> int:
    """Bytes that what is left takes at least: of each part, with what is kept below it.

    A tape, and the state that it was made from, are there until the parts above are reversed.
    """
    sizes, width = problem.sizes, problem.width
    b, fields = key & NEXT_MASK, key >> NEXT_BITS
    need, kept, start, below = 0, 0, 1, 0
    for i in range(1, min(b, len(sizes.state) - 1) + 1):
        field = (fields >> ((i - 1) * width)) & ((1 << width) - 1)
        if field > 1:
            kept += sizes.tape[sizes.first_tape[i] + (field >> 1) - 1]
            if below & 1:
                kept += sizes.state[i - 1]
            need = max(need, kept)
            start = i + 1
        elif field:
            need = max(need, kept + problem.least[start, i])
            start = i + 1
        below = field
    return max(need, kept + problem.least[start, b]) if start <= b else need


@compiled
def _raise_limit(space: _Space, counters: Bytes) -> bool:
    """Open what waits with the fewest bytes; whether anything did."""
    while counters[_WAITING]:
        need, position = space.heap_needs[0], space.heap[0]
        pop(space.heap_needs, space.heap, counters[_WAITING])
        counters[_WAITING] -= 1
        if need == space.needs[position]:  # else it was opened with less
            counters[_LIMIT] = need
            space.stack[0] = position
            counters[_OPEN] = 1
            return True
    return False
