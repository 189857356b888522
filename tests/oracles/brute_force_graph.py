"""Dijkstra's algorithm over the schedules of a tiny graph, written from the rules."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ckptsched.workload.graph import Graph


@dataclass(frozen=True, slots=True)
class Position:
    """Where a schedule stands; bit i of a number is node i."""

    states: int = 1
    tapes: int = 0
    done: int = 0
    turned: bool = False
    sweep: int = 0
    """Of the sweeps since the last backward: which is going on. 0 where that is no matter."""
    last: int = 0
    """The node that this sweep has reached."""
    bare: frozenset[tuple[int, int]] = frozenset()
    """Nodes whose tape is there, with states that it was made from: those by themselves."""


def cheapest_on_graph(graph: Graph, budget: int, *, sweeps: int | None = None) -> float:
    """Least seconds over schedules within a budget; infinite where none fits.

    Args:
        graph: At most some five nodes.
        budget: Bytes.
        sweeps: None for all schedules. Else backwards come in the reverse of the nodes' order,
            and between two of them nodes run in their order, this many times over.
    """
    start = Position()
    if _level(graph, start) > budget:
        return math.inf
    ties = itertools.count()
    heap = [(0.0, next(ties), start)]
    best = {start: 0.0}
    end = (1 << len(graph) + 1) - 2
    while heap:
        seconds, _, position = heapq.heappop(heap)
        if position.done == end:
            return seconds
        if seconds > best[position]:
            continue
        before = _level(graph, position)
        for then, need, cost in _moves(graph, position, sweeps):
            total = seconds + cost
            if before + need <= budget and total < best.get(then, math.inf):
                best[then] = total
                heapq.heappush(heap, (total, next(ties), then))
    return math.inf


def _has(bits: int, i: int) -> bool:
    return bool(bits >> i & 1)


def _available(position: Position, i: int) -> bool:
    return _has(position.states | position.tapes, i)


def _gradient(graph: Graph, position: Position, u: int) -> bool:
    """Whether the gradient of state u is stored."""
    n = len(graph)
    begun = position.turned if u == n else any(_has(position.done, v) for v in graph.readers[u])
    return begun and not _has(position.done, u)


def _level(graph: Graph, position: Position) -> int:
    c = graph.arrays
    level = graph.held_bytes
    for i in range(len(graph) + 1):
        level += int(c.state_bytes[i]) * _has(position.states, i)
        level += int(c.tape_bytes[i]) * _has(position.tapes, i)
        level += int(c.gradient_bytes[i]) * _gradient(graph, position, i)
        level += int(c.parameter_gradient_bytes[i]) * _has(position.done, i)
    return level


def _moves(
    graph: Graph, position: Position, sweeps: int | None
) -> Iterator[tuple[Position, int, float]]:
    """Position after, bytes above the level before, seconds."""
    n, c = len(graph), graph.arrays
    fresh = replace(position, sweep=0, last=0)
    if not position.turned and _available(position, n):
        need = int(c.gradient_bytes[n]) + graph.loss_overhead_bytes
        yield replace(fresh, turned=True), need, graph.loss_seconds
    for i in range(1, n + 1):
        sources = graph.reads[i - 1]
        if all(_available(position, u) for u in sources):
            for bits, size in (("states", c.state_bytes[i]), ("tapes", c.tape_bytes[i])):
                if not _has(getattr(position, bits), i) and not _has(position.done, i):
                    then = _swept(position, i, sweeps)
                    if then is not None:
                        then = replace(then, **{bits: getattr(position, bits) | 1 << i})
                        need = int(size + c.forward_overhead_bytes[i])
                        if bits == "tapes":  # a run reads the bare state where both are there
                            bare = {(i, u) for u in sources if _has(position.states, u)}
                            then = replace(then, bare=position.bare | bare)
                        yield then, need, float(c.forward_seconds[i])
            last = sweeps is None or position.done >> i + 1 == (1 << n - i) - 1
            if last and _backward_comes(graph, position, i):
                need = int(sum(c.gradient_bytes[u] for u in sources))
                need += int(c.backward_overhead_bytes[i] + c.parameter_gradient_bytes[i])
                tapes, done = position.tapes ^ 1 << i, position.done | 1 << i
                rest = frozenset(pair for pair in position.bare if pair[0] != i)
                then = replace(fresh, tapes=tapes, done=done, bare=rest)
                yield then, need, float(c.backward_seconds[i])
        # A tape keeps the copy of a state that it was made from, be there another or not.
        holders = [v for v in graph.readers[i] if _has(position.tapes, v)]
        if _has(position.states, i) and not any((v, i) in position.bare for v in holders):
            yield replace(position, states=position.states ^ 1 << i), 0, 0.0
        if _has(position.tapes, i) and all((v, i) in position.bare for v in holders):
            rest = frozenset(pair for pair in position.bare if pair[0] != i)
            yield replace(position, tapes=position.tapes ^ 1 << i, bare=rest), 0, 0.0


def _backward_comes(graph: Graph, position: Position, i: int) -> bool:
    return (
        _has(position.tapes, i)
        and not _has(position.done, i)
        and (position.turned if i == len(graph) else True)
        and all(_has(position.done, v) for v in graph.readers[i])
    )


def _swept(position: Position, i: int, sweeps: int | None) -> Position | None:
    """The position once node i runs, as far as sweeps are concerned."""
    if sweeps is None:
        return position
    if i > position.last:
        return replace(position, last=i)
    if position.sweep + 1 < sweeps:
        return replace(position, sweep=position.sweep + 1, last=i)
    return None
