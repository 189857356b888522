"""Plans the graph of a recorded model by a search in exact bytes.

It begins with a plan for the chain of live sets, whose runs are a schedule of the graph, too, and
mostly of fewer bytes (though snapshots of random states may lie longer). The search then changes
which node runs in which phase, where its tape is made, and which of its tapes that is. What runs
take follows from their order alone, to the byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from ...base.progress import report
from ...schedule.language import Code, Schedule
from ...simulator.simulator import simulate
from ...simulator.value_bytes import ValueLedger, with_drops_by_value
from ...workload.graph import Graph
from . import search_kernel, value_kernel
from .cuts_solver import Judged
from .search_kernel import table_of

_MOVES_AT_ONCE = 2_000
"""Moves between two words on the progress."""


# Moves for one budget: as many as take a second or two, as a look takes longer on a larger graph.
_MOST_MOVES, _NODE_MOVES = 60_000, 6_000_000
# Runs of a node up to which a look takes as long as expected; of longer schedules there are fewer.
_MANY_RUNS = 40
# Seconds that a change for the worse may cost at the start and at the end, in mean runs of a node.
_HEATS = ((0.5, 0.01), (0.1, 0.001))
# What a budget that is missed by a hundredth counts as, in runs of all nodes.
_PRICE = 0.1
# Of the seconds of storing everything: what is so near is not searched.
_NEAR = 0.001


@final
@dataclass(frozen=True, slots=True)
class Found:
    """Schedules of a graph that a search knows."""

    known: tuple[Judged, ...]
    least: Judged
    """One of few bytes, which is found for every budget that is too little for a start."""

    def best(self, budget: int) -> Judged | None:
        """The one of least seconds that fits a budget."""
        fitting = (item for item in self.known if item[1].peak_bytes <= budget)
        return min(fitting, key=lambda item: (item[1].seconds, item[1].peak_bytes), default=None)

    @property
    def least_bytes(self) -> int:
        """The least budget for which one is found."""
        return self.least[1].peak_bytes


def searched(
    graph: Graph,
    budgets: Sequence[int],
    starts: Sequence[Schedule],
    least: Schedule | None = None,
    moves: int | None = None,
) -> Found:
    """Search the graph of a recorded model for each budget.

    Args:
        graph: The graph.
        budgets: Bytes that the peak may reach.
        starts: Schedules to begin with, for its chain of live sets or for the graph.
        least: One of the least peak that is known, the same whatever the budgets, where some budget
            is too little for the starts. It or a start is given.
        moves: How many are tried for each budget; None for as many as take a second or two.

    Returns:
        The starts by value, and what was found.
    """
    begins = [*starts] if least is None else [*starts, least]
    space = _Space(graph, max(map(_run_count, begins)), moves)
    known = [space.judged(start) for start in starts]
    if least is not None:
        known += [space.judged(least), space.annealed(least, 0)]
        lowest = known[-1]
    else:
        lowest = min(known, key=_peak)
    enough = graph.store_all_seconds * (1 + _NEAR)
    for budget in sorted(set(budgets)):
        start = Found(tuple(known), lowest).best(budget)
        if start is None or start[1].seconds > enough:
            begin = min(known, key=_peak) if start is None else start
            known.append(space.annealed(begin[0], budget))
    return Found(tuple(known), lowest)


def _peak(item: Judged) -> int:
    return item[1].peak_bytes


@final
class _Space:
    """The tables of one graph: looked at, and searched.

    Args:
        graph: The graph.
        longest: Operations of the longest start, drops apart.
        moves: How many a search tries; None for as many as take a second or two.
    """

    def __init__(self, graph: Graph, longest: int, moves: int | None) -> None:
        self.graph, self.n, self.moves = graph, len(graph), moves
        self.figures, self.room = _figures(graph, longest)
        self.scratch = search_kernel.scratch(self.n)

    def table(self, schedule: Schedule) -> tuple[search_kernel.Table, value_kernel.Integers]:
        """What runs when in a schedule, and the tape of each node."""
        return table_of(self.n, schedule), _options(self.n, schedule)

    def judged(self, schedule: Schedule) -> Judged:
        """A schedule with the same runs, by value, simulated."""
        return self._of_table(*self.table(schedule))

    def _of_table(self, table: search_kernel.Table, option: value_kernel.Integers) -> Judged:
        at, _ = value_kernel.pack(self.figures, table, option, self.scratch, self.room)
        schedule = with_drops_by_value(self.graph, self.room.packed[at:].copy())
        return schedule, simulate(self.graph, schedule)

    def annealed(self, start: Schedule, budget: int) -> Judged:
        """The best schedule that a search from another meets; of least peak where none fits."""
        moves = self.moves
        if moves is None:
            moves = min(_MOST_MOVES, _NODE_MOVES // max(self.n, _run_count(start) // _MANY_RUNS))
        best, best_option = self.table(start)
        peak, seconds = value_kernel.look(self.figures, best, best_option, self.scratch, self.room)
        found = np.array([peak, seconds], np.float64)
        forward = self.figures.forward
        run = max(float(forward[1:].mean()), 1e-300)
        price = _PRICE * float(forward.sum()) / (0.01 * max(budget, 1, int(found[0] / 10)))
        random = np.random.default_rng(0)
        for k, ends in enumerate(_HEATS):
            table, option = self.table(start)
            search_kernel.copy(table, best)
            option[:] = best_option
            part = moves // len(_HEATS)
            heat = np.geomspace(*ends, max(1, part)) * run
            for done in range(0, part, _MOVES_AT_ONCE):
                report(f"search on a graph of {self.n} nodes", (k + done / part) / len(_HEATS))
                some = heat[done : min(part, done + _MOVES_AT_ONCE)]
                draws = random.random((len(some), search_kernel.DRAWS))
                value_kernel.anneal(
                    *(self.figures, table, option, best, best_option, self.scratch, self.room),
                    *(draws, budget, price, some, found),
                )
        return self._of_table(best, best_option)


def _run_count(schedule: Schedule) -> int:
    """Operations of a schedule, drops apart."""
    return int(np.count_nonzero(schedule.codes != Code.DROP))


def _options(n: int, schedule: Schedule) -> value_kernel.Integers:
    """By node the tape that a schedule runs it with."""
    option = np.zeros(n + 1, np.int64)
    taped = schedule.codes == Code.TAPED_FORWARD
    option[schedule.stages[taped]] = schedule.kinds[taped]
    return option


def _figures(graph: Graph, longest: int) -> tuple[value_kernel.Figures, value_kernel.Room]:
    """What the kernel looks up, and room for it."""
    n = len(graph)
    # Plans of few bytes run stages as often as there are stages; a search makes no more of that.
    operations = max(_MANY_RUNS * (n + 1), longest)
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
