"""Solvers by name: each a pure function from a chain and a budget to a schedule."""

from __future__ import annotations

from collections.abc import Callable

from ..base.errors import WorkloadError
from .base import AbstractSolver as AbstractSolver
from .base import Solution as Solution
from .base import infeasible as infeasible
from .baselines import BASELINE_NAMES as BASELINE_NAMES
from .baselines import Baseline as Baseline
from .baselines import baselines_for as baselines_for
from .binomial.periodic import Periodic as Periodic
from .binomial.revolve import Revolve as Revolve
from .chain.solver import ChainDp as ChainDp
from .graph.cuts_solver import GraphCuts as GraphCuts
from .graph.ilp_solver import GraphIlp as GraphIlp
from .graph.ilp_solver import solve_graph as solve_graph
from .graph.search import GraphSearch as GraphSearch
from .runs.solver import RunDp as RunDp

SOLVERS: dict[str, Callable[[], AbstractSolver]] = {
    "chain_dp": ChainDp,
    "revolve": Revolve,
    "run_dp": RunDp,
    "periodic": Periodic,
    "graph_cuts": GraphCuts,
    "graph_ilp": GraphIlp,
    "graph_search": GraphSearch,
}
"""Makers of the solvers that search; `get_solver` knows the baselines as well."""

SOLVER_NAMES = (*SOLVERS, *BASELINE_NAMES)
"""What `get_solver` takes; `every_<k>` stands for `every_4` and so on."""


def get_solver(name: str) -> AbstractSolver:
    """Find a solver by its name, with default options.

    Args:
        name: Such as "chain_dp", "revolve", "store_all" or "every_4".

    Raises:
        WorkloadError: No solver has the name; the message lists those that do.
    """
    make = SOLVERS.get(name)
    if make is not None:
        return make()
    try:
        return Baseline(name)
    except WorkloadError:
        raise WorkloadError(
            f"no solver is called {name!r}; the solvers are " + ", ".join(SOLVER_NAMES)
        ) from None
