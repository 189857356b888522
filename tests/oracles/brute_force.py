"""Oracles for tiny chains, written from the rules and not from the recurrence.

`persistent_frontier` enumerates schedules and lets the simulator judge them, so that it serves
the planning model and the ledger alike. `cheapest` is Dijkstra's algorithm over all schedules
of the planning model.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
from collections.abc import Iterator

from ckptsched.schedule.language import (
    Backward,
    Drop,
    Forward,
    Kind,
    Operation,
    Schedule,
    Turn,
    Value,
)
from ckptsched.simulator.simulator import simulate
from ckptsched.workload.chain import Chain

# What is kept of each state ("" nothing, "x" itself, "0", "1", … its tape by that option), the
# next backward, whether the loss is still to come, and whether the last run made a state that may
# still go.
Position = tuple[tuple[str, ...], int, bool, bool]


@functools.cache
def persistent_schedules(n: int, tapes: tuple[int, ...] = ()) -> tuple[Schedule, ...]:
    """All memory-persistent schedules of n stages.

    Args:
        n: Number of stages.
        tapes: How many tapes each stage offers; one each where it is empty.

    Runs start from the topmost state available below the next backward. When a state that the
    run before has made is read, it is decided whether it stays; what stays, does so until the
    backward that consumes it.
    """
    found = []
    start: Position = (("x",) + ("",) * n, n, True, False)
    todo: list[tuple[Position, tuple[Operation, ...]]] = [(start, ())]
    while todo:
        position, done = todo.pop()
        if position[1] == 0:
            found.append(Schedule.of(done))
        else:
            steps = _steps(position, tapes or (1,) * n)
            todo += [(then, (*done, *operations)) for then, operations in steps]
    return tuple(found)


def _steps(
    position: Position, tapes: tuple[int, ...]
) -> Iterator[tuple[Position, tuple[Operation, ...]]]:
    kept, b, before_loss, fresh = position
    top = max(k for k in range(b + 1) if kept[k])
    if before_loss and top == b:
        yield (_without(kept, b), b, False, False), (Turn(), *_drop(kept, b))
    elif top == b:
        rest = _without((*kept[:b], "", *kept[b + 1 :]), b - 1)
        yield (rest, b - 1, False, False), (Backward(b), *_drop(kept, b - 1))
    else:
        i = top + 1
        for k in range(tapes[i - 1]):
            taped = Forward(i, tape=True, option=k)
            yield (_put(kept, i, str(k)), b, before_loss, False), (taped,)
        if before_loss or i < b:
            yield (_put(kept, i, "x"), b, before_loss, True), (Forward(i),)
            if fresh:
                rest = _without(_put(kept, i, "x"), top)
                yield (rest, b, before_loss, True), (Forward(i), *_drop(kept, top))


def _put(kept: tuple[str, ...], i: int, what: str) -> tuple[str, ...]:
    return (*kept[:i], what, *kept[i + 1 :])


def _without(kept: tuple[str, ...], i: int) -> tuple[str, ...]:
    return _put(kept, i, "") if kept[i] == "x" else kept


def _drop(kept: tuple[str, ...], i: int) -> tuple[Operation, ...]:
    return (Drop(Value(Kind.STATE, i)),) if kept[i] == "x" else ()


def persistent_frontier(chain: Chain) -> list[tuple[int, float]]:
    """Least seconds by peak: every persistent schedule that no other beats in both."""
    tapes = tuple(len(stage.tapes) for stage in chain.stages)
    traces = [simulate(chain, schedule) for schedule in persistent_schedules(len(chain), tapes)]
    frontier: list[tuple[int, float]] = []
    for peak, seconds in sorted((trace.peak_bytes, trace.seconds) for trace in traces):
        if not frontier or seconds < frontier[-1][1]:
            frontier.append((peak, seconds))
    return frontier


def cheapest_of(frontier: list[tuple[int, float]], budget: int) -> float:
    """Least seconds of a frontier within a budget; infinite where nothing fits."""
    return min((seconds for peak, seconds in frontier if peak <= budget), default=math.inf)


def cheapest(chain: Chain, budget: int, *, pinned: bool = True) -> float:
    """Least seconds over all schedules of the planning model within a budget.

    Args:
        chain: At most some six stages.
        budget: Bytes.
        pinned: Whether a tape's input must stay while the tape does.
    """
    n, c = len(chain), chain.arrays
    fixed = chain.held_bytes
    sizes = {"": [0] * (n + 1), "x": c.state_bytes.tolist()}
    for k in range(max(len(stage.tapes) for stage in chain.stages)):
        tapes = (stage.tapes[min(k, len(stage.tapes) - 1)] for stage in chain.stages)
        sizes[str(k)] = [0, *(tape.tape_bytes for tape in tapes)]
    later = [int(c.parameter_gradient_bytes[i + 1 :].sum()) for i in range(n + 1)]
    w_g = c.gradient_bytes.tolist()

    def level(kept: tuple[str, ...], b: int) -> int:
        gradient = 0 if b > n else w_g[b] + later[b]
        return fixed + gradient + sum(sizes[k][i] for i, k in enumerate(kept))

    start = ("x",) + ("",) * n
    if level(start, n + 1) > budget:
        return math.inf
    ties = itertools.count()
    heap = [(0.0, next(ties), start, n + 1)]
    best = {(start, n + 1): 0.0}
    while heap:
        seconds, _, kept, b = heapq.heappop(heap)
        if b == 0:
            return seconds
        if seconds > best[kept, b]:
            continue
        for then, b2, need, cost in _moves(chain, sizes, kept, b, pinned):
            total = seconds + cost
            fits = level(kept, b) + need <= budget
            if fits and total < best.get((then, b2), math.inf):
                best[then, b2] = total
                heapq.heappush(heap, (total, next(ties), then, b2))
    return math.inf


def _moves(
    chain: Chain, sizes: dict[str, list[int]], kept: tuple[str, ...], b: int, pinned: bool
) -> Iterator[tuple[tuple[str, ...], int, int, float]]:
    """Position after, next backward after, bytes above the level before, seconds."""
    n, c = len(chain), chain.arrays
    w_g = c.gradient_bytes
    if b == n + 1 and kept[n]:
        yield kept, n, int(w_g[n]) + chain.loss_overhead_bytes, chain.loss_seconds
    if b <= n and kept[b].isdigit() and kept[b - 1]:
        tape = chain.stages[b - 1].tapes[int(kept[b])]
        need = int(w_g[b - 1] + tape.backward_overhead_bytes + c.parameter_gradient_bytes[b])
        yield _put(kept, b, ""), b - 1, need, tape.backward_seconds
    for i in range(1, n + 1):
        if kept[i - 1] and not kept[i]:
            need = sizes["x"][i] + int(c.forward_overhead_bytes[i])
            yield _put(kept, i, "x"), b, need, float(c.forward_seconds[i])
            for k, tape in enumerate(chain.stages[i - 1].tapes):
                need = tape.tape_bytes + tape.forward_overhead_bytes
                yield _put(kept, i, str(k)), b, need, tape.forward_seconds
        held = pinned and i < n and kept[i + 1].isdigit()
        if kept[i] and not held:
            yield _put(kept, i, ""), b, 0, 0.0
