"""Plans of recorded models made better by value: each stage is given what it reads alone.

A chain hands live sets on as a whole, and a plan of it keeps or drops them so. Where a model has
branches or skips, a plan of its graph, which keeps what is read later and nothing else, is
often much faster. The search starts from the chain's plan, and whichever is better is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..base.errors import InfeasibleBudgetError
from ..solvers.base import infeasible
from ..solvers.graph.value_search import Found, searched
from ..workload.chain import Chain
from ..workload.graph import Graph
from .plan import Plan
from .plan_words import excess
from .solver_choice import ALL_SCHEDULES

MOST_STAGES = 1_500
"""Of more the table of a search, whose size grows with the square, is of no use."""


def may_gain(chain: Chain) -> bool:
    """Whether a chain is that of a recorded model that is no path, and may be planned by value."""
    if not chain.values or not chain.has_ledger or len(chain) > MOST_STAGES:
        return False
    if any(stage.once for stage in chain.stages):
        return False
    return any(each.makers != (i,) for i, each in enumerate(chain.values))


def better_by_value(
    chain: Chain,
    results: Sequence[Plan | InfeasibleBudgetError],
    store_all_bytes: int,
    planned: Callable[[int], Plan | InfeasibleBudgetError],
) -> list[Plan | InfeasibleBudgetError]:
    """The same plans, or plans of the chain's graph where these take less time or fit at all.

    Args:
        chain: A chain that may gain.
        results: A plan for each budget, or why there is none.
        store_all_bytes: Peak of storing everything.
        planned: Plans the chain for a budget.

    Returns:
        For each the plan that takes the least time: of those by value a larger budget never takes
        longer. Why there is none names a budget that works by value, if that is less.
    """
    graph = Graph.of_values(chain)
    starts = [x.schedule for x in results if isinstance(x, Plan)]
    errors = [x for x in results if isinstance(x, InfeasibleBudgetError)]
    least = None
    if errors and errors[0].least_budget_bytes is not None:
        plan = planned(errors[0].least_budget_bytes)
        least = plan.schedule if isinstance(plan, Plan) else None
    if not starts and least is None:
        return list(results)
    found = searched(graph, [x.budget_bytes for x in results], starts, least)
    return [_better(graph, x, found, store_all_bytes) for x in results]


def _better(
    graph: Graph, result: Plan | InfeasibleBudgetError, found: Found, store_all_bytes: int
) -> Plan | InfeasibleBudgetError:
    best = found.best(result.budget_bytes)
    needed = found.least_bytes
    if isinstance(result, Plan):
        if best is None or excess(result.seconds, best[1].seconds) == 0:
            return result
        needed = min(needed, result.least_budget_bytes)
    elif best is None:
        known = result.least_budget_bytes
        if known is not None and known <= needed:
            return result
        return infeasible(graph, result.budget_bytes, found.least[1], "known")
    return Plan(
        chain=graph,
        schedule=best[0],
        trace=best[1],
        solver="graph_search",
        schedule_class=ALL_SCHEDULES,
        budget_bytes=result.budget_bytes,
        budget_text=f"{result.budget_bytes} bytes",
        store_all_bytes=store_all_bytes,
        least_budget_bytes=needed,
        lower_bound_seconds=graph.store_all_seconds,
    )
