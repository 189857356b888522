"""Plans a graph by a search that begins with the chain of its live sets.

That chain is planned by `chain_dp`, and its plan is within some percent of the best on most
networks. What it cannot do is to let one state of a live set go and keep another: the search
changes which node runs in which phase, and where its tape is made, by simulated annealing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from ...base.errors import InfeasibleBudgetError, WorkloadError
from ...base.progress import report
from ...schedule.language import Backward, Forward, Operation, Schedule, Turn
from ...simulator.simulator import simulate
from ...workload.chain import Chain
from ...workload.graph import Graph
from ..base import AbstractGraphSolver, Solution, infeasible
from ..chain.solver import ChainDp, Effort
from . import search_kernel as kernel
from .cuts_solver import ALL_SCHEDULES, GraphCuts, Judged, plain_schedules
from .live_sets import live_sets
from .to_schedule import with_drops
from .value_search import searched

# Moves for one budget: as many as take some seconds, as a look takes longer on a larger graph; and
# small ones have few tables to try.
_MOST_MOVES, _NODE_MOVES, _CUBE_MOVES = 400_000, 80_000_000, 200
# Of more neither the chain nor a table, whose size grows with the square of the nodes, is of use.
_MOST_NODES = 1_500
_MOVES_AT_ONCE = 20_000
# Seconds that a change for the worse may cost at the start and at the end, in mean runs of a node.
# Small graphs gain most where much may change, large ones by small changes to the chain's plan.
_HEATS = ((0.5, 0.01), (0.1, 0.001))
# The chain's plan is a start and no more: no long search for the best of its class, and of a long
# chain a table of few slots.
_EFFORT, _LONG, _LONG_EFFORT = Effort(additions=1e11, looks=10_000_000), 400, 7e10
# What a budget that is missed by a hundredth counts as, in runs of all nodes.
_PRICE = 0.1


@final
@dataclass(frozen=True)
class GraphSearch(AbstractGraphSolver):
    """The chain of live sets planned by `chain_dp`, and made better by a search over runs.

    Never worse than that chain's plan, to which `chain_dp` is given less time than it takes by
    itself, than `graph_cuts` and than storing everything. Graphs of more than 1,500 nodes are left
    to `graph_cuts`. It claims no bound but that no schedule takes less than storing everything;
    `graph_ilp` proves more on small graphs. The same graph and budget give the same plan each time.
    """

    moves: int | None = None
    """Moves that are tried for each budget; None for as many as take some seconds."""

    name = "graph_search"

    def __post_init__(self) -> None:
        """Refuse a negative number of moves."""
        if self.moves is not None and self.moves < 0:
            raise WorkloadError(f"graph_search needs 0 moves or more, found {self.moves}")

    def solve_each(
        self, chain: Chain | Graph, budgets: Sequence[int]
    ) -> list[Solution | InfeasibleBudgetError]:
        """Solve for several budgets; a larger one takes over what a smaller one found."""
        if isinstance(chain, Graph) and chain.lined is not None:
            return self._solve_by_value(chain, budgets)
        if isinstance(chain, Chain) or chain.is_path or len(chain) > _MOST_NODES:
            return GraphCuts().solve_each(chain, budgets)
        known = _known(chain, budgets)
        found: dict[int, Solution | InfeasibleBudgetError] = {}
        for budget in sorted(set(budgets)):
            best = _best(known, budget)
            if best is None or best[1].seconds > chain.store_all_seconds:
                known += self._searched(chain, budget, best or _least(known))
            found[budget] = _answer(chain, budget, known)
        return [found[budget] for budget in budgets]

    def _solve_by_value(
        self, graph: Graph, budgets: Sequence[int]
    ) -> list[Solution | InfeasibleBudgetError]:
        """As `solve_each`, of the graph of a recorded model: in exact bytes, from its chain."""
        assert graph.lined is not None
        starts, least = starts_for(graph.lined, [*budgets, 0])
        found = searched(graph, budgets, starts, least, self.moves)
        return [_answer(graph, budget, found.known) for budget in budgets]

    def _searched(self, graph: Graph, budget: int, start: Judged) -> list[Judged]:
        """What a search from a schedule finds for a budget: nothing, or one that is better."""
        moves = self.moves
        if moves is None:
            n = len(graph)
            moves = min(_MOST_MOVES, _NODE_MOVES // n, _CUBE_MOVES * n**3)
        found = []
        for heat in _HEATS:
            runs = _annealed(graph, start[0], budget, moves // len(_HEATS), heat)
            schedule = with_drops(graph, runs)
            found.append((schedule, simulate(graph, schedule)))
            start = _best([start, *found], budget) or _least([start, *found])
        return found


def starts_for(chain: Chain, budgets: Sequence[int]) -> tuple[list[Schedule], Schedule | None]:
    """Plans of a chain for some budgets, and for its least where one of them is below that."""
    effort = replace(_EFFORT, additions=_LONG_EFFORT) if len(chain) > _LONG else _EFFORT
    solver = ChainDp(effort=effort)
    *planned, below = solver.solve_each(chain, [*budgets, 0])
    starts = [x.schedule for x in planned if isinstance(x, Solution)]
    least = below.least_budget_bytes if isinstance(below, InfeasibleBudgetError) else None
    if least is None or min(budgets, default=least) >= least:
        return starts, None
    (found,) = solver.solve_each(chain, [least])
    return starts, found.schedule if isinstance(found, Solution) else None


def _known(graph: Graph, budgets: Sequence[int]) -> list[Judged]:
    """Schedules that are known without a search; one of few bytes if a budget is below the rest."""
    by_cuts = GraphCuts().solve_each(graph, budgets)
    known = [(x.schedule, x.trace) for x in by_cuts if isinstance(x, Solution)]
    lined = live_sets(graph)
    with suppress(WorkloadError):  # too many nodes for its table
        starts, least = starts_for(lined.chain, budgets)
        for start in (*starts, *([] if least is None else [least])):
            schedule = lined.lower(start)
            known.append((schedule, simulate(graph, schedule)))
    if len(known) < len(budgets):
        known += plain_schedules(graph)
    return known


def _best(known: Sequence[Judged], budget: int) -> Judged | None:
    """The known schedule of least seconds that fits a budget."""
    fitting = (item for item in known if item[1].peak_bytes <= budget)
    return min(fitting, key=lambda item: (item[1].seconds, item[1].peak_bytes), default=None)


def _least(known: Sequence[Judged]) -> Judged:
    """The known schedule of least peak."""
    return min(known, key=lambda item: (item[1].peak_bytes, item[1].seconds))


def _answer(graph: Graph, budget: int, known: Sequence[Judged]) -> Solution | InfeasibleBudgetError:
    best, least = _best(known, budget), _least(known)
    if best is None:
        return infeasible(graph, budget, least[1], "known")
    return Solution(
        schedule=best[0],
        trace=best[1],
        schedule_class=ALL_SCHEDULES,
        lower_bound_seconds=graph.store_all_seconds,
        least_budget_bytes=least[1].peak_bytes,
    )


# -- the search


def _annealed(
    graph: Graph, start: Schedule, budget: int, moves: int, heats: tuple[float, float]
) -> list[Operation]:
    """The runs of the best table that a search from a schedule finds.

    Args:
        graph: The graph.
        start: The schedule.
        budget: Bytes that the peak may reach.
        moves: How many are tried.
        heats: What a change for the worse may cost at first and in the end, in mean runs.
    """
    n, net = len(graph), _network(graph)
    table, room = kernel.table_of(n, start), kernel.scratch(n)
    best = kernel.table_of(n, start)
    peak, seconds = kernel.look(net, best, room)
    found = np.array([peak, seconds], np.float64)
    run, all_runs = float(net.seconds[1:].mean()), float(net.seconds.sum())
    price = _PRICE * all_runs / (0.01 * max(1, budget))
    heat = np.geomspace(*heats, max(1, moves)) * max(run, 1e-300)
    random = np.random.default_rng(0)
    for done in range(0, moves, _MOVES_AT_ONCE):
        report(f"search on a graph of {n} nodes", done / moves)
        part = heat[done : min(moves, done + _MOVES_AT_ONCE)]
        draws = random.random((len(part), kernel.DRAWS))
        kernel.anneal(net, table, best, room, draws, budget, price, part, found)
    return _runs(best, n)


def _network(graph: Graph) -> kernel.Network:
    """The graph's figures, as the kernel takes them."""
    n, c = len(graph), graph.arrays
    first, source = _flat([(), *graph.reads])
    first_from, reader = _flat(graph.readers)
    level, ending = _by_phase(graph)
    state = np.array(c.state_bytes, np.int64)
    state[0] = graph.input_bytes
    return kernel.Network(
        first=first,
        source=source,
        first_from=first_from,
        reader=reader,
        state=state,
        tape=np.array(c.tape_bytes, np.int64),
        overhead=np.array(c.forward_overhead_bytes, np.int64),
        seconds=np.array(c.forward_seconds, np.float64),
        level=level[: n + 1],
        ending=ending,
    )


def _flat(rows: Sequence[Sequence[int]]) -> tuple[kernel.Integers, kernel.Integers]:
    first = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return first, np.array([x for row in rows for x in row], np.int64)


def _by_phase(graph: Graph) -> tuple[kernel.Integers, kernel.Integers]:
    """Bytes of all but states and tapes in each phase, and what ends it takes besides."""
    n, c = len(graph), graph.arrays
    gradients, new = c.gradient_bytes.tolist(), c.parameter_gradient_bytes.tolist()
    level, ending = [graph.held_bytes], [gradients[n] + graph.loss_overhead_bytes]
    begun, bytes_now = {n}, graph.held_bytes + gradients[n]
    for b in range(n, 0, -1):
        level.append(bytes_now)
        read = graph.reads[b - 1]
        ending.append(sum(gradients[u] for u in read) + new[b] + int(c.backward_overhead_bytes[b]))
        bytes_now += new[b] - gradients[b] + sum(gradients[u] for u in read if u not in begun)
        begun.update(read)
    return np.array(level, np.int64), np.array(ending, np.int64)


def _runs(table: kernel.Table, n: int) -> list[Operation]:
    """The runs that a table stands for, in order."""
    runs: list[Operation] = []
    for k in range(n + 1):
        for v in np.flatnonzero(table.runs[k]).tolist():
            runs.append(Forward(v, tape=bool(table.runs[k, v] == kernel.TAPED)))
        runs.append(Backward(n + 1 - k) if k else Turn())
    return runs
