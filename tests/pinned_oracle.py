"""The best of all pinned schedules of a tiny chain, by Dijkstra's algorithm on plain sets.

Every operation that the rules of docs/theory.md allow is tried, useful or not: a state may be
made beside its tape, tapes may be dropped. Only what a tape was made from stays as long as it.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator

from ckptsched.workload import Chain

# States that are kept, tapes by stage and option, the next backward; n + 1 where the loss is next.
Position = tuple[frozenset[int], frozenset[tuple[int, int]], int]


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
    level += sum(chain.stages[i - 1].tapes[k].tape_bytes for i, k in tapes)
    if b <= len(chain):
        level += int(columns.gradient_bytes[b] + columns.parameter_gradient_bytes[b + 1 :].sum())
    return level


def _operations(chain: Chain, position: Position) -> Iterator[tuple[Position, int, float]]:
    """Position after, bytes above the level before, seconds."""
    states, tapes, b = position
    n, c = len(chain), chain.arrays
    taped = {i for i, _ in tapes}
    kept = states | taped
    if b == n + 1 and n in kept:
        need = int(c.gradient_bytes[n]) + chain.loss_overhead_bytes
        yield (states, tapes, n), need, chain.loss_seconds
    for i in range(1, n + 1):
        if i - 1 in kept and i not in states:
            need = int(c.state_bytes[i] + c.forward_overhead_bytes[i])
            yield (states | {i}, tapes, b), need, float(c.forward_seconds[i])
        for k, tape in enumerate(chain.stages[i - 1].tapes):
            if i - 1 in kept and i not in taped:
                need = tape.tape_bytes + tape.forward_overhead_bytes
                yield (states, tapes | {(i, k)}, b), need, tape.forward_seconds
            if (i, k) in tapes and b == i and i - 1 in kept:
                need = int(c.gradient_bytes[i - 1] + c.parameter_gradient_bytes[i])
                need += tape.backward_overhead_bytes
                yield (states, tapes - {(i, k)}, i - 1), need, tape.backward_seconds
            # Of two copies of state i, tape i + 1 is taken to keep the bare one.
            if (i, k) in tapes and (i + 1 not in taped or i in states):
                yield (states, tapes - {(i, k)}, b), 0, 0.0
        if i in states and i + 1 not in taped:
            yield (states - {i}, tapes, b), 0, 0.0
