"""Rematerialisation of a graph as an integer program, with the solver's bound as the proof."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

import numpy as np

from ...base.budget import exact_bytes
from ...base.errors import (
    InfeasibleBudgetError,
    SolverRefusalError,
    SolverTimeoutError,
    WorkloadError,
)
from ...schedule.language import Schedule
from ...schedule.trace import Trace
from ...simulator.simulator import simulate
from ...workload.chain import Chain
from ...workload.graph import Graph
from ..base import AbstractGraphSolver, Solution, infeasible
from .cuts_solver import ALL_SCHEDULES, Judged, plain_schedules
from .orders import Reordered, orders
from .search import GraphSearch
from .to_schedule import with_drops

if TYPE_CHECKING:
    from .milp_model import GraphModel

# What solves programs is imported where there is one: it takes longer than most plans.

# What is counted grows with nodes**3: with 150 nodes the program has 60,000 variables, takes ten
# seconds to write and a gigabyte.
MOST_NODES = 150
# Up to so many it proves something in a minute, or betters what `graph_search` has found.
PROVED_NODES = 40
# Branches side by side can be counted in many ways; each is a program of its own.
MOST_ORDERS = 24
# Up to so many nodes two sweeps a phase are searched: that is some five times the work.
_TWO_SWEEPS_NODES = 10
# Of the time for a budget, what the least budget may take.
_LEAST_SHARE = 0.25

FRONTIER_ADVANCING = "frontier-advancing schedules"
"""The class that `GraphIlp` searches."""
SWEEPS = " of {} sweeps"
"""Added where a phase may have several."""
IN_ORDER = ", in the graph's order"
"""Added where the nodes can be counted in too many ways."""
PLANNING_SIZES = ", in the planning model"
"""Added for a chain whose exact bytes the bound does not know."""


@final
@dataclass(frozen=True)
class GraphIlp(AbstractGraphSolver):
    """Optimal among frontier-advancing schedules, proven by the solver's bound.

    Frontier-advancing: between two Backwards, and before Turn, there is one sweep through the
    nodes in a topological order, in which each is run at most once; Backwards come in the
    reverse of that order. Where a graph has at most `MOST_ORDERS` such orders each is tried;
    else its own alone, and the class says so. Small graphs are given two sweeps, and then the
    optimum was that of all schedules wherever those could be searched (`docs/concepts/graphs.md`).

    A chain is planned with the planning model's sizes. Where it has exact bytes the schedule
    keeps the budget in those too, and the bound holds for the planning model.
    """

    time_limit_seconds: float = 60.0
    """Seconds for each budget, a quarter of the first's for the least budget; roughly, as what was
    begun is ended: a part of the program that is written down, a step of the solver."""
    sweeps: int | None = None
    """Sweeps a phase; None for two on graphs of up to ten nodes, one on larger ones."""

    name = "graph_ilp"

    def __post_init__(self) -> None:
        """Refuse a limit that leaves no time, and no sweeps."""
        if self.sweeps is not None and self.sweeps < 1:
            raise WorkloadError(f"graph_ilp needs one sweep or more, found {self.sweeps}")
        if not 0 < self.time_limit_seconds < math.inf:
            raise WorkloadError(
                f"graph_ilp needs a time limit of more than 0 seconds, found "
                f"{self.time_limit_seconds!r}"
            )

    def solve_each(
        self, chain: Chain | Graph, budgets: Sequence[int]
    ) -> list[Solution | InfeasibleBudgetError]:
        """Solve for several budgets; the least budget is looked for once.

        Returns:
            A solution for each budget, or why there is none: it is infeasible, or nothing was
            found in time, which the message then says.

        Raises:
            SolverTimeoutError: The limit ended before anything was known of any budget.
            WorkloadError: There are too many nodes.
        """
        if len(chain) > MOST_NODES:
            raise SolverRefusalError(
                f"graph_ilp takes at most {MOST_NODES} nodes, found {len(chain)}; graph_search "
                "takes larger graphs, chain_dp longer chains"
            )
        graph = Graph.from_chain(chain) if isinstance(chain, Chain) else chain
        sweeps = self.sweeps or (2 if len(graph) <= _TWO_SWEEPS_NODES else 1)
        search = _GraphPlanning(chain, graph, self.time_limit_seconds, sweeps)
        # First, as from a plain schedule the solver finds more than from one that is nearly good.
        search.find_least()
        for solution in GraphSearch().solve_each(graph, budgets):
            if isinstance(solution, Solution):
                search.know(solution.schedule)
        # A larger budget chooses from what a smaller one found, too.
        found = {budget: search.solve(budget) for budget in sorted(set(budgets))}
        least = search.least[1].peak_bytes
        return _answers([found[budget] for budget in budgets], budgets, least)


def _answers(
    found: Sequence[Solution | InfeasibleBudgetError | SolverTimeoutError],
    budgets: Sequence[int],
    least: int,
) -> list[Solution | InfeasibleBudgetError]:
    """What is said of each budget; raises where the time sufficed for none."""
    late = [x for x in found if isinstance(x, SolverTimeoutError)]
    if late and len(late) == len(found):
        raise late[0]
    return [
        InfeasibleBudgetError(str(x), budget_bytes=budget, least_budget_bytes=least)
        if isinstance(x, SolverTimeoutError)
        else x
        for x, budget in zip(found, budgets, strict=True)
    ]


class _TimeUpError(Exception):
    """The time for a program is over before it is written."""


@final
@dataclass(eq=False)
class _GraphPlanning:
    """What is shared between the budgets of one graph."""

    workload: Chain | Graph
    """What was asked for."""
    graph: Graph
    """The same as a graph."""
    limit: float
    """Seconds for each budget."""
    sweeps: int
    """Sweeps a phase."""
    orders: list[Reordered] = field(init=False)
    schedule_class: str = field(init=False)
    known: list[Judged] = field(init=False)
    """Schedules and their simulations; all that is found is added."""
    least_bound: int = field(init=False)
    """No schedule of the class has a lower peak."""
    begun: float = field(init=False)
    """When the time for the next budget began."""
    end: float = field(init=False)
    """When the time for what is being solved is over."""

    def __post_init__(self) -> None:
        """Take down what needs no solver."""
        self.begun = time.perf_counter()
        self.orders, complete = orders(self.graph, MOST_ORDERS)
        self.schedule_class = FRONTIER_ADVANCING
        if self.sweeps > 1:
            self.schedule_class += SWEEPS.format(self.sweeps)
        if not complete:
            self.schedule_class += IN_ORDER
        if self.workload.has_ledger:
            self.schedule_class += PLANNING_SIZES
        self.known = plain_schedules(self.graph)
        self.least_bound = _largest(self.graph)

    def find_least(self) -> None:
        """Look for the least budget."""
        self.end = self.begun + _LEAST_SHARE * self.limit
        bound = max(self._minimise(None), self.least_bound)
        self.least_bound = int(min(bound, self.least[1].peak_bytes))

    @property
    def least(self) -> Judged:
        """The known schedule of least peak."""
        return min(self.known, key=lambda item: (item[1].peak_bytes, item[1].seconds))

    def best(self, budget: int) -> Judged | None:
        """The known schedule of least seconds that fits a budget."""
        fitting = (item for item in self.known if item[1].peak_bytes <= budget)
        return min(fitting, key=lambda item: item[1].seconds, default=None)

    def know(self, schedule: Schedule) -> Trace:
        """Add a schedule to what is known."""
        trace = simulate(self.graph, schedule)
        self.known.append((schedule, trace))
        return trace

    def _learn(self, order: Reordered, model: GraphModel) -> Trace:
        """Add the schedule of a program's solution."""
        return self.know(with_drops(self.graph, list(order.to_old(model.runs()))))

    def solve(self, budget: int) -> Solution | InfeasibleBudgetError | SolverTimeoutError:
        """The best for one budget, and the proof."""
        if budget < self.least_bound:
            return self._infeasible(budget)
        self.end = self.begun + self.limit
        name, bound = ALL_SCHEDULES, self.graph.store_all_seconds
        best = self.best(budget)
        if best is None or best[1].seconds > bound:
            name, bound = self.schedule_class, max(bound, self._minimise(budget))
            best = self.best(budget)
        late, self.begun = time.perf_counter() > self.end, time.perf_counter()
        if best is None:
            if math.isinf(bound):
                self.least_bound = max(self.least_bound, budget + 1)
                return self._infeasible(budget)
            return self._out_of_time(budget) if late else self._not_found(budget)
        schedule, trace = best
        return Solution(
            schedule=schedule,
            trace=simulate(self.workload, schedule),
            schedule_class=name,
            lower_bound_seconds=min(bound, trace.seconds),
            least_budget_bytes=self.least[1].peak_bytes,
        )

    def _minimise(self, budget: int | None) -> float:
        """Solve the programs of all orders for seconds, or for the peak where budget is None.

        Returns:
            A bound that holds wherever no better schedule is known; infinite where none of the
            class is better than those, or, if none is known, there is none.
        """
        bound = math.inf
        try:
            for order in self.orders:
                bound = min(bound, self._solve(order, budget))
        except _TimeUpError:
            return 0.0
        return bound

    def _left(self) -> float:
        """Seconds that are left for what is being solved."""
        left = self.end - time.perf_counter()
        if left <= 0:
            raise _TimeUpError
        return left

    def _write(
        self, order: Reordered, budget: int | None, *, rounds_up: bool = False
    ) -> GraphModel:
        from .milp_model import GraphModel

        return GraphModel(
            order.graph,
            budget,
            sweeps=self.sweeps,
            rounds_up=rounds_up,
            before_sweep=self._left,
        )

    def _solve(self, order: Reordered, budget: int | None) -> float:
        """Solve one order's program; returns its bound in bytes or seconds."""
        from .milp_backend import minimise

        model = self._write(order, budget)
        best = self.least if budget is None else self.best(budget)
        start = None
        if best is not None:
            start = model.start(order.to_new(best[0]))
            if start is None:
                model.at_most(best[1])
        what = f"integer program of {len(self.graph)} nodes"
        left = self._left()
        outcome = minimise(model.problem, time_limit_seconds=left, start=start, what=what)
        found = outcome.status in ("optimal", "stopped")
        trace = self._learn(order, model) if found else None
        if trace is not None and budget is not None and trace.peak_bytes > budget:
            with suppress(_TimeUpError):  # the bound holds without
                self._fit(order, budget)
        return model.bound(outcome.bound)

    def _fit(self, order: Reordered, budget: int) -> None:
        """Solve again with sizes rounded up, where a schedule for those rounded down is too big."""
        from .milp_backend import minimise

        model = self._write(order, budget, rounds_up=True)
        best = self.best(budget)
        if best is not None:
            model.at_most(best[1])
        outcome = minimise(model.problem, time_limit_seconds=self._left())
        if outcome.status in ("optimal", "stopped"):
            self._learn(order, model)

    def _infeasible(self, budget: int) -> InfeasibleBudgetError:
        trace = simulate(self.workload, self.least[0], model="planning")
        return infeasible(self.workload, budget, trace, "frontier-advancing")

    def _not_found(self, budget: int) -> InfeasibleBudgetError:
        """The error where a budget is so close to the least that no proof tells them apart."""
        least = self.least[1].peak_bytes
        return InfeasibleBudgetError(
            f"no frontier-advancing schedule was found for {exact_bytes(budget, budget=True)}, "
            f"which is the least to within what rounding sizes takes: {exact_bytes(least)} works, "
            f"and nothing less than {exact_bytes(self.least_bound)} does",
            budget_bytes=budget,
            least_budget_bytes=least,
        )

    def _out_of_time(self, budget: int) -> SolverTimeoutError:
        least = self.least[1].peak_bytes
        return SolverTimeoutError(
            f"graph_ilp found no schedule for {exact_bytes(budget, budget=True)} "
            f"in {self.limit:g} seconds, and no proof that there is none; a budget of "
            f"{exact_bytes(least)} works, or a longer time limit may",
            limit_seconds=self.limit,
        )


def _largest(graph: Graph) -> int:
    """Bytes of the largest run with tape or backward, which every schedule has."""
    c, w_g = graph.arrays, graph.arrays.gradient_bytes
    runs = c.tape_bytes + c.forward_overhead_bytes
    backwards = c.tape_bytes + w_g + c.backward_overhead_bytes + c.parameter_gradient_bytes
    return graph.input_bytes + graph.held_bytes + int(np.maximum(runs, backwards)[1:].max())


def solve_graph(graph: Graph, budget_bytes: int, *, time_limit_seconds: float = 60.0) -> Solution:
    """Plan a graph by `graph_search`, and prove or better that by `graph_ilp` where that is small.

    The program starts from what the search finds, so its answer is never worse.

    Args:
        graph: The graph.
        budget_bytes: Bytes that the simulated peak may reach.
        time_limit_seconds: Seconds that the program may take, roughly, as in `GraphIlp`.

    Raises:
        InfeasibleBudgetError: Nothing fits that could be found.
        SolverTimeoutError: The limit ended before a schedule was found.
    """
    if len(graph) > PROVED_NODES:
        return GraphSearch().solve(graph, budget_bytes)
    return GraphIlp(time_limit_seconds=time_limit_seconds).solve(graph, budget_bytes)
