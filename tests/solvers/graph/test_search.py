"""The chain of live sets and the search that begins with it: laws on random graphs and networks."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsched.base.errors import InfeasibleBudgetError, WorkloadError
from ckptsched.schedule.language import Backward, Forward, Operation, Turn
from ckptsched.simulator.simulator import simulate
from ckptsched.solvers import ChainDp, GraphCuts, GraphIlp, GraphSearch, Solution, get_solver
from ckptsched.solvers.graph import search_kernel as kernel
from ckptsched.solvers.graph.live_sets import live_sets
from ckptsched.solvers.graph.search import _network
from ckptsched.solvers.graph.to_schedule import with_drops
from ckptsched.workload.chain import Chain
from ckptsched.workload.graph import Graph
from tests.oracles.brute_force import persistent_schedules
from tests.support.graphs import graphs, residual, two_branches, u_net
from tests.support.shared_chains import uniform

QUICK = GraphSearch(moves=4_000)
NETWORKS = {"residual": residual(3), "U-Net": u_net(3), "branches": two_branches(5)}


@st.composite
def runs_of(draw: st.DrawFn, graph: Graph) -> list[Operation]:
    """Runs in which each node runs at most once in a phase, and with tape in one of them."""
    n = len(graph)
    taped = [draw(st.integers(0, n + 1 - v)) for v in range(1, n + 1)]
    runs: list[Operation] = []
    for k in range(n + 1):
        for v in range(1, min(n, n + 1 - k) + 1 if k else n + 1):
            if taped[v - 1] == k:
                runs.append(Forward(v, tape=True))
            elif k == 0 or draw(st.booleans()):
                runs.append(Forward(v))
        runs.append(Backward(n + 1 - k) if k else Turn())
    return runs


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_look_gives_what_the_simulator_does(data: st.DataObject) -> None:
    graph = data.draw(graphs(most_nodes=6))
    runs = data.draw(runs_of(graph))
    schedule = with_drops(graph, runs)
    trace = simulate(graph, schedule)
    table = kernel.table_of(len(graph), runs)
    peak, seconds = kernel.look(_network(graph), table, kernel.scratch(len(graph)))
    assert graph.store_all_seconds + seconds == pytest.approx(trace.seconds)
    assert peak <= trace.peak_bytes
    both = any(
        table.taped[u] <= table.taped[v] and kernel.BARE in table.runs[: table.taped[v] + 1, u]
        for v, sources in enumerate(graph.reads, 1)
        for u in sources
    )
    if not both:  # no tape is made where the bare state and its tape are both there
        assert peak == trace.peak_bytes


@settings(max_examples=60, deadline=None)
@given(graphs(most_nodes=4))
def test_the_chain_of_live_sets_bounds_what_its_schedules_take(graph: Graph) -> None:
    lined = live_sets(graph)
    assert len(lined.chain) == len(graph)
    for schedule in itertools.islice(persistent_schedules(len(graph)), 60):
        runs = list(schedule)
        if Forward(len(graph), tape=True) not in runs[: runs.index(Turn())]:
            continue
        on_chain = simulate(lined.chain, schedule)
        lowered = simulate(graph, lined.lower(schedule))
        assert lowered.peak_bytes <= on_chain.peak_bytes
        assert lowered.seconds <= on_chain.seconds * (1 + 1e-12)


@settings(max_examples=30, deadline=None)
@given(graphs(most_nodes=6), st.integers(2, 9))
def test_never_worse_than_the_chain_nor_than_cuts(graph: Graph, tenths: int) -> None:
    top = GraphCuts().solve(graph, 10**9).trace.peak_bytes
    budget = top * tenths // 10
    (found,) = QUICK.solve_each(graph, [budget])
    lined = live_sets(graph)
    for other in (
        *GraphCuts().solve_each(graph, [budget]),
        *ChainDp().solve_each(lined.chain, [budget]),
    ):
        if isinstance(other, Solution):
            assert isinstance(found, Solution)
            assert found.trace.seconds <= other.trace.seconds * (1 + 1e-12)
    if isinstance(found, Solution):
        assert found.trace.peak_bytes <= budget
        assert simulate(graph, found.schedule) == found.trace
    else:
        assert found.least_budget_bytes is not None
        assert found.least_budget_bytes > budget
        again = QUICK.solve(graph, found.least_budget_bytes)
        assert again.trace.peak_bytes <= found.least_budget_bytes


@pytest.mark.parametrize("name", NETWORKS)
def test_within_a_point_of_the_proven_optimum(name: str) -> None:
    graph = NETWORKS[name]
    top = GraphCuts().solve(graph, 10**12).trace.peak_bytes
    budgets = [top * k // 20 for k in range(9, 20, 2)]
    proven = GraphIlp(time_limit_seconds=20).solve_each(graph, budgets)
    close = []
    for exact, found in zip(proven, GraphSearch().solve_each(graph, budgets), strict=True):
        if isinstance(exact, Solution) and exact.trace.seconds <= exact.lower_bound_seconds * 1.001:
            excess = math.inf
            if isinstance(found, Solution):
                excess = (found.trace.seconds - exact.trace.seconds) / graph.store_all_seconds
            close.append(excess <= 0.01)
    assert len(close) >= 3
    assert sum(close) >= 0.9 * len(close)


@pytest.mark.parametrize("name", NETWORKS)
def test_more_bytes_never_take_longer_in_one_call(name: str) -> None:
    graph = NETWORKS[name]
    top = GraphCuts().solve(graph, 10**12).trace.peak_bytes
    budgets = [top * k // 24 for k in range(8, 25)]
    found = [x for x in QUICK.solve_each(graph, budgets) if isinstance(x, Solution)]
    assert len(found) >= 8
    assert all(a.trace.seconds >= b.trace.seconds for a, b in itertools.pairwise(found))


def test_the_same_again() -> None:
    graph = u_net(3)
    top = GraphCuts().solve(graph, 10**12).trace.peak_bytes
    assert QUICK.solve(graph, top * 3 // 4) == QUICK.solve(graph, top * 3 // 4)


def test_paths_and_chains_are_left_to_chains() -> None:
    chain = uniform(6)
    graph = Graph.from_chain(chain)
    budget = ChainDp().solve(chain, 10**9).trace.peak_bytes // 2
    expected = ChainDp().solve(chain, budget).trace.seconds
    assert QUICK.solve(graph, budget).trace.seconds == expected
    assert QUICK.solve(chain, budget).trace.seconds == expected


def test_names_and_bad_input() -> None:
    assert isinstance(get_solver("graph_search"), GraphSearch)
    with pytest.raises(WorkloadError, match="0 moves or more, found -1"):
        GraphSearch(moves=-1)
    with pytest.raises(InfeasibleBudgetError, match="the least that works"):
        QUICK.solve(u_net(2), 1)


def test_a_chain_keeps_its_type() -> None:
    assert isinstance(live_sets(u_net(2)).chain, Chain)


def test_a_graph_that_is_too_large_to_search_goes_by_its_cuts() -> None:
    graph = two_branches(760)
    assert len(graph) > 1_500
    budget = GraphCuts().solve(graph, 10**9).trace.peak_bytes
    assert GraphSearch().solve(graph, budget) == GraphCuts().solve(graph, budget)
