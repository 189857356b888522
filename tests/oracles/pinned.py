"""The best of all pinned schedules of a tiny chain, by Dijkstra's algorithm on plain sets.

Every operation that the rules of docs/concepts/theory.md allow is tried, useful or not: a state
may be made beside its tape, tapes may be dropped. Only what a tape was made from stays as long as
it.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator

from ckptsched.workload.chain import Chain

# A tape: its stage, its option, and whether it was made from the bare state, which is what a run
# reads where both copies are there.
Tape = tuple[int, int, bool]
# States that are kept, tapes, the next backward; n + 1 where the loss is next.
Position = tuple[frozenset[int], frozenset[Tape], int]


def cheapest_pinned(chain: Chain, budget: int) -> float:
    """Least seconds of a pinned schedule within a budget; infinite where none fits."""
    ties = itertools.count()
    start: Position = (frozenset({0}), frozenset(), len(chain) + 1)
    best = {start: 0.0}
    heap = [(0.0, next(ties), start)]
    while heap:
        seconds, _, position = heapq.heappop(heap)
        if seconds > best[position]:
            continue
        if position[2] == 0:
            return seconds
        level = _level(chain, position)
        for then, need, cost in _operations(chain, position):
            total = seconds + cost
            if level + need <= budget and total < best.get(then, math.inf):
                best[then] = total
                heapq.heappush(heap, (total, next(ties), then))
    return math.inf


def least_budget(chain: Chain) -> int:
    """The least budget that a pinned schedule keeps."""
    high = 1
    while math.isinf(cheapest_pinned(chain, high)):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        if math.isinf(cheapest_pinned(chain, middle)):
            low = middle
        else:
            high = middle
    return high if low or math.isinf(cheapest_pinned(chain, 0)) else 0


def _level(chain: Chain, position: Position) -> int:
    states, tapes, b = position
    columns = chain.arrays
    level = chain.held_bytes + int(columns.state_bytes[list(states)].sum())
    level += sum(chain.stages[i - 1].tapes[k].tape_bytes for i, k, _ in tapes)
    if b <= len(chain):
        level += int(columns.gradient_bytes[b] + columns.parameter_gradient_bytes[b + 1 :].sum())
    return level


def _operations(chain: Chain, position: Position) -> Iterator[tuple[Position, int, float]]:
    """Position after, bytes above the level before, seconds."""
    states, tapes, b = position
    n, c = len(chain), chain.arrays
    taped = {i for i, _, _ in tapes}
    kept = states | taped
    held = {(i - 1, alone) for i, _, alone in tapes}  # copies that tapes were made from
    if b == n + 1 and n in kept:
        need = int(c.gradient_bytes[n]) + chain.loss_overhead_bytes
        yield (states, tapes, n), need, chain.loss_seconds
    for i in range(1, n + 1):
        if i - 1 in kept and i not in states:
            need = int(c.state_bytes[i] + c.forward_overhead_bytes[i])
            yield (states | {i}, tapes, b), need, float(c.forward_seconds[i])
        for k, tape in enumerate(chain.stages[i - 1].tapes):
            if i - 1 in kept and i not in taped:
                made = (i, k, i - 1 in states)
                need = tape.tape_bytes + tape.forward_overhead_bytes
                yield (states, tapes | {made}, b), need, tape.forward_seconds
        for _, k, alone in (x for x in tapes if x[0] == i):
            rest = tapes - {(i, k, alone)}
            if b == i and i - 1 in kept:
                tape = chain.stages[i - 1].tapes[k]
                need = int(c.gradient_bytes[i - 1] + c.parameter_gradient_bytes[i])
                need += tape.backward_overhead_bytes
                yield (states, rest, i - 1), need, tape.backward_seconds
            if (i, False) not in held:
                yield (states, rest, b), 0, 0.0
        if i in states and (i, True) not in held:
            yield (states - {i}, tapes, b), 0, 0.0
