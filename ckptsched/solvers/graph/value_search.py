"""Plans the graph of a recorded model by a search in exact bytes.

It begins with a plan for the chain of live sets, the same runs of which are a schedule of the graph
that takes no more. The search then changes which node runs in which phase, where its tape is made,
and which of its tapes that is. What a table of runs takes follows from its order alone, to the byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from ...base.progress import report
from ...schedule.language import Code, Schedule
from ...simulator.value_bytes import ValueLedger, with_drops_by_value
from ...workload.graph import Graph
from . import search_kernel, value_kernel
from .search import _table

_MOVES_AT_ONCE = 2_000
"""Moves between two words on the progress."""


@final
@dataclass(frozen=True, slots=True)
class Found:
    """A schedule that the search has found."""

    schedule: Schedule
    peak_bytes: int
    seconds: float
    """Of all runs, without the loss."""


def search_values(
    graph: Graph, start: Schedule, budget: int, moves: int, heats: Sequence[tuple[float, float]]
) -> Found:
    """Search from the runs of a schedule.

    Args:
        graph: The graph of a recorded model.
        start: For its chain of live sets, or for the graph.
        budget: Bytes that the peak may reach.
        moves: How many are tried.
        heats: For each part of the search the seconds that a change for the worse may cost at first
            and in the end, in mean runs of a node.

    Returns:
        The best schedule that fits; where none does, the one of the least peak that was met.
    """
    n = len(graph)
    figures, room = _figures(graph)
    scratch = search_kernel.scratch(n)
    best, best_option = _table(n, start), _options(n, start)
    peak, seconds = value_kernel.look(figures, best, best_option, scratch, room)
    found = np.array([peak, seconds], np.float64)
    run = max(float(figures.forward[1:].mean()), 1e-300)
    price = 0.1 * float(figures.forward.sum()) / (0.01 * max(1, budget))
    random = np.random.default_rng(0)
    for k, ends in enumerate(heats):
        table, option = _table(n, start), best_option.copy()
        search_kernel._copy(table, best)
        part = moves // len(heats)
        heat = np.geomspace(*ends, max(1, part)) * run
        for done in range(0, part, _MOVES_AT_ONCE):
            report(f"search on a graph of {n} nodes", (k + done / part) / len(heats))
            some = heat[done : min(part, done + _MOVES_AT_ONCE)]
            draws = random.random((len(some), search_kernel.DRAWS))
            value_kernel.anneal(
                *(figures, table, option, best, best_option, scratch, room),
                *(draws, budget, price, some, found),
            )
    at, seconds = value_kernel.pack(figures, best, best_option, scratch, room)
    schedule = with_drops_by_value(graph, room.packed[at:].copy())
    return Found(schedule, int(found[0]), float(seconds))


def _options(n: int, schedule: Schedule) -> value_kernel.Integers:
    """By node the tape that a schedule runs it with."""
    option = np.zeros(n + 1, np.int64)
    taped = schedule.codes == Code.TAPED_FORWARD
    option[schedule.stages[taped]] = schedule.kinds[taped]
    return option


def _figures(graph: Graph) -> tuple[value_kernel.Figures, value_kernel.Room]:
    """What the kernel looks up, and room for it."""
    n, most = len(graph), (len(graph) + 1) ** 2
    operations = min(most, 40 * n + 100)
    ledger = ValueLedger(graph, operations)
    tapes = [stage.tapes for stage in graph.stages]
    figures = value_kernel.Figures(
        ledgers=ledger.ledgers,
        stages=ledger.stages,
        wiring=ledger.wiring,
        level=ledger.level,
        forward=np.array([0.0, *(stage.forward_seconds for stage in graph.stages)]),
        first_tape=np.cumsum([0, 0, *map(len, tapes)], dtype=np.int64),
        taped=np.array([tape.seconds for each in tapes for tape in each]),
    )
    room = value_kernel.Room(
        books=ledger.books,
        packed=np.zeros(operations, np.int64),
        during=ledger.during,
        needed=np.zeros(n + 1, np.uint8),
    )
    return figures, room
