"""certify="all", graphs and time limits: what plan() says about all schedules, and takes."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ckptsched as cs
from ckptsched.errors import InfeasibleBudgetError, PlanMismatchError, WorkloadError
from ckptsched.frontier import tradeoff
from ckptsched.graph import Graph
from ckptsched.inverse import least_budget
from ckptsched.planner import plan, plan_each
from ckptsched.plans import Plan
from ckptsched.simulator import simulate
from ckptsched.solvers import ExactSearch, GraphCuts, Solution
from ckptsched.workload import Chain
from tests.brute_force_graph import cheapest_on_graph
from tests.graphs import graphs, residual
from tests.helpers import example, tiny_cases
from tests.small_chains import mixed_chain, uniform_chain
from tests.strategies import chains


def seconds_of(result: Plan | InfeasibleBudgetError) -> float:
    return result.seconds if isinstance(result, Plan) else math.inf


def test_all_schedules_of_all_tiny_cases() -> None:
    better = 0
    for case in tiny_cases():
        chain = Chain.from_json(case["chain"])
        budgets = [row[0] for row in case["optimum"]]
        results = plan_each(chain, budgets, certify="all")
        pinned = [math.inf if row[2] is None else row[2] for row in case["optimum"]]
        persistent = [math.inf if row[3] is None else row[3] for row in case["optimum"]]
        assert [seconds_of(result) for result in results] == pinned
        better += pinned != persistent
        for result in results:
            if isinstance(result, Plan):
                assert result.gap == 0
                assert result.schedule_class in ("all pinned schedules", "all schedules")
    assert better


@given(chain=chains(5), share=st.integers(20, 100))
@settings(max_examples=40)
def test_certify_all_is_never_costlier(chain: Chain, share: int) -> None:
    budget = max(1, plan(chain, budget=10**6).store_all_bytes * share // 100)
    (wide,) = plan_each(chain, [budget], certify="all")
    (narrow,) = plan_each(chain, [budget])
    assert seconds_of(wide) <= seconds_of(narrow) * (1 + 1e-12)
    if isinstance(wide, Plan):
        assert wide.lower_bound_seconds <= wide.seconds * (1 + 1e-12)
        if isinstance(narrow, Plan) and "all" in narrow.schedule_class:
            assert narrow.lower_bound_seconds <= wide.seconds * (1 + 1e-12)


def test_a_checkpoint_that_is_made_again() -> None:
    chain = example("E4")
    found = plan(chain, budget=24, certify="all")
    assert (found.seconds, found.lower_bound_seconds) == (100, 100)
    assert "no pinned schedule takes less" in str(found)


def test_where_the_theorem_holds_the_class_is_named_at_once() -> None:
    made = plan(mixed_chain(), budget="60%")
    assert made.schedule_class == "all pinned schedules"
    grows = Chain.from_json(mixed_chain().to_json() | {"w_a": [0, *range(1000, 13000, 1000)]})
    assert plan(grows, budget="60%").schedule_class != "all schedules"


def test_an_infeasible_budget_names_both_least_budgets() -> None:
    chain = example("E4")
    with pytest.raises(InfeasibleBudgetError) as caught:
        plan(chain, budget=23, certify="all")
    assert "no memory-persistent schedule fits" in str(caught.value)
    assert "of all pinned schedules the least budget known is 24 B" in str(caught.value)
    assert caught.value.least_budget_bytes == 24


@pytest.mark.parametrize("solver", ["auto", "chain_dp", "beyond_persistent", "exact_search"])
@pytest.mark.parametrize("certify", ["class", "all"])
def test_budgets_beyond_64_bits(solver: str, certify: Any) -> None:
    made = plan(example("E4"), budget=10**400, solver=solver, certify=certify)
    assert (made.overhead, made.gap, made.budget_bytes) == (0, 0, 10**400)


def test_a_search_for_the_least_budget_gives_up() -> None:
    """Together the searches meet no more positions than one may; what was found holds."""
    chain = example("E4")
    for most in (1, 20, 400):
        with pytest.raises(InfeasibleBudgetError) as caught:
            ExactSearch(most_positions=most).solve(chain, 23)
        least = caught.value.least_budget_bytes
        assert least is not None
        assert 24 <= least <= 25
        assert plan(chain, budget=least, solver="exact_search").peak_bytes <= least


def test_a_chain_with_a_ledger_is_bounded_by_store_all() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)])
    chain = cs.profile(model, torch.randn(64, 8))
    made = plan(chain, budget="80%", certify="all")
    assert made.schedule_class == "all schedules"
    assert made.lower_bound_seconds == chain.store_all_seconds
    assert made.gap > 0
    note = "this is the time of storing everything: no closer bound was found, as none on all"
    assert note in str(made)
    assert note[1:] in str(made.explain())
    for other in (plan(chain, budget="80%"), plan(chain, budget="100%", certify="all")):
        assert "no closer bound" not in str(other)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"certify": "some"}, 'certify is "class" or "all", found \'some\''),
        ({"time_limit": 0}, "a time limit of 0 s leaves no time"),
        ({"time_limit": math.nan}, "a time limit of nan s leaves no time"),
        ({"time_limit": math.inf}, "a time limit of inf s leaves no time"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], words: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        plan(mixed_chain(), budget="50%", **options)
    assert words in str(caught.value)


@given(graph=graphs(), share=st.integers(20, 100))
@settings(max_examples=25)
def test_graphs_are_planned_as_well_as_can_be(graph: Graph, share: int) -> None:
    budget = max(1, plan(graph, budget=10**6).store_all_bytes * share // 100)
    (result,) = plan_each(graph, [budget], certify="all")
    expected = cheapest_on_graph(graph, budget)
    assert seconds_of(result) == pytest.approx(expected, rel=1e-9)
    if isinstance(result, Plan):
        assert result.chain == graph
        assert simulate(graph, result.schedule).peak_bytes <= budget
        assert result.gap == pytest.approx(0, abs=1e-9)


def test_a_network_with_residual_sums() -> None:
    graph = residual()
    made = plan(graph, budget="60%")
    assert made.peak_bytes <= made.budget_bytes
    segments = GraphCuts().solve(graph, made.budget_bytes)
    assert isinstance(segments, Solution)
    assert made.seconds <= segments.trace.seconds
    assert str(made.explain())
    found = tradeoff(graph, 4)
    assert found.rows[-1].plan.overhead == 0
    assert "store_all" in str(found)
    assert least_budget(graph, overhead=0.2).overhead <= 0.2


def test_a_path_is_planned_as_its_chain() -> None:
    graph = Graph.from_chain(mixed_chain())
    made, chain = plan(graph, budget="50%"), plan(mixed_chain(), budget="50%")
    assert made.schedule == chain.schedule
    assert (made.gap, made.schedule_class) == (chain.gap, chain.schedule_class)
    assert made.chain == graph


def test_solvers_of_chains_take_no_graph() -> None:
    with pytest.raises(WorkloadError) as caught:
        plan(residual(), budget="60%", solver="chain_dp")
    assert "chain_dp takes chains, and this graph" in str(caught.value)
    assert 'graph_ilp, graph_cuts, store_all, or "auto"' in str(caught.value)
    assert plan(residual(), budget="100%", solver="store_all").solver == "store_all"


def test_a_time_limit_that_ends_early_leaves_a_plan() -> None:
    made = plan(residual(), budget="60%", time_limit=1e-6)
    assert made.peak_bytes <= made.budget_bytes


def test_no_model_runs_a_graph() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    made = plan(Graph.from_chain(uniform_chain(2)), budget="100%")
    with pytest.raises(PlanMismatchError, match="for a graph, and models are run as chains"):
        cs.checkpointed(model, made)
