"""Segments between cuts: what they are, that their figures bound, what a path gives."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsched.base.errors import InfeasibleBudgetError, WorkloadError
from ckptsched.simulator.simulator import simulate
from ckptsched.solvers import ChainDp, GraphCuts, Solution, get_solver
from ckptsched.solvers.graph.cuts_solver import cuts, merge, plain_schedules
from ckptsched.workload.chain import Chain
from ckptsched.workload.graph import Graph
from tests.oracles.brute_force import persistent_schedules
from tests.support.graphs import graphs, residual, two_branches, u_net
from tests.support.shared_chains import example, uniform
from tests.support.strategies import chains


def test_cuts_of_networks() -> None:
    assert cuts(residual(2)) == [0, 3, 6, 7]
    assert cuts(u_net(2)) == [0, 1, 5, 6]
    assert cuts(two_branches(2)) == [0, 5, 6]
    assert cuts(Graph.from_chain(uniform(3))) == [0, 1, 2, 3]


@settings(max_examples=100, deadline=None)
@given(graphs(most_nodes=7))
def test_no_edge_leads_past_a_cut(graph: Graph) -> None:
    edges = [(u, v) for v, sources in enumerate(graph.reads, 1) for u in sources]
    expected = [c for c in range(len(graph) + 1) if not any(u < c < v for u, v in edges)]
    assert cuts(graph) == expected


@settings(max_examples=60, deadline=None)
@given(graphs(most_nodes=7))
def test_the_chain_bounds_what_its_schedules_take(graph: Graph) -> None:
    merged = merge(graph)
    assert len(merged.chain) == len(cuts(graph)) - 1
    assert merged.chain.store_all_seconds == pytest.approx(graph.store_all_seconds)
    if len(merged.chain) > 4:
        return
    for schedule in persistent_schedules(len(merged.chain)):
        on_chain = simulate(merged.chain, schedule)
        lowered = simulate(graph, merged.lower(schedule))
        assert lowered.peak_bytes <= on_chain.peak_bytes
        assert lowered.seconds == pytest.approx(on_chain.seconds)


@settings(max_examples=40, deadline=None)
@given(chains(most_stages=5), st.integers(1, 3))
def test_a_path_is_planned_as_the_chain_that_it_is(chain: Chain, part: int) -> None:
    graph = Graph.from_chain(chain)
    assert merge(graph).chain == graph.to_chain()
    solutions = ChainDp().solve_each(chain, [10**6])
    assert isinstance(solutions[0], Solution)
    budget = solutions[0].trace.peak_bytes * part // 3
    (a,), (b,) = ChainDp().solve_each(chain, [budget]), GraphCuts().solve_each(graph, [budget])
    if isinstance(a, Solution):
        assert isinstance(b, Solution)
        assert b.trace.seconds <= a.trace.seconds
        assert b.lower_bound_seconds <= b.trace.seconds
        assert (b.schedule_class, b.trace.peak_bytes <= budget) == (a.schedule_class, True)
    assert GraphCuts().solve_each(chain, [budget])[0].__class__ is a.__class__


@pytest.mark.parametrize("graph", [residual(), u_net(), two_branches()])
def test_plans_keep_their_budgets(graph: Graph) -> None:
    top = plain_schedules(graph)[0][1].peak_bytes
    budgets = [top * k // 10 for k in range(1, 12)]
    results = GraphCuts().solve_each(graph, budgets)
    found = [x for x in results if isinstance(x, Solution)]
    for budget, result in zip(budgets, results, strict=True):
        if isinstance(result, InfeasibleBudgetError):
            assert result.least_budget_bytes is not None
            assert result.least_budget_bytes > budget
        else:
            assert simulate(graph, result.schedule).peak_bytes <= budget
            assert result.lower_bound_seconds == graph.store_all_seconds
    assert all(a.trace.seconds >= b.trace.seconds for a, b in pairwise(found))
    assert found[-1].trace.seconds == graph.store_all_seconds


def test_too_many_segments_for_a_table_are_planned_by_rules(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(solver: ChainDp, chain: Chain, budgets: list[int]) -> list[Solution]:
        raise WorkloadError("too long")

    monkeypatch.setattr(ChainDp, "solve_each", refuse)
    graph = residual(blocks=60)
    top = plain_schedules(graph)[0][1].peak_bytes
    solution = GraphCuts().solve(graph, top // 4)
    assert solution.trace.peak_bytes <= top // 4
    assert solution.trace.seconds < 1.4 * graph.store_all_seconds


def test_names() -> None:
    assert isinstance(get_solver("graph_cuts"), GraphCuts)
    solution = GraphCuts().solve(residual(), 150)
    assert "add" in solution.trace.peak_operation or "conv" in solution.trace.peak_operation
    with pytest.raises(InfeasibleBudgetError, match="no segmented schedule fits a budget of 1 B"):
        GraphCuts().solve(residual(), 1)
    assert GraphCuts().solve(example("E1"), 9).trace.seconds == 6
