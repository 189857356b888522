"""The integer program: equal to brute force, its bound, its limits, its errors."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path

import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsched.base.errors import InfeasibleBudgetError, SolverTimeoutError, WorkloadError
from ckptsched.base.progress import listening
from ckptsched.schedule.language import Schedule
from ckptsched.simulator.simulator import simulate
from ckptsched.solvers import ChainDp, GraphCuts, GraphIlp, Solution, solve_graph
from ckptsched.solvers.graph import milp_backend as graph_milp
from ckptsched.solvers.graph.ilp_solver import FRONTIER_ADVANCING, IN_ORDER, MOST_NODES, MOST_ORDERS
from ckptsched.solvers.graph.milp_backend import minimise
from ckptsched.solvers.graph.milp_model import GraphModel
from ckptsched.solvers.graph.orders import orders, reordered
from ckptsched.solvers.graph.to_schedule import on_demand_runs, store_all_runs, with_drops
from ckptsched.workload.chain import Chain
from ckptsched.workload.graph import Graph
from ckptsched.workload.stage import Stage
from tests.oracles.brute_force import persistent_schedules
from tests.oracles.brute_force_graph import cheapest_on_graph
from tests.oracles.pinned import cheapest_pinned, least_budget
from tests.support.graphs import graphs, residual, two_branches, u_net
from tests.support.shared_chains import EXAMPLES, exact_stage, example, steps, tiny_cases, uniform
from tests.support.strategies import chains

IN_ANY_TIME = 1e6  # seconds: a slow machine proves what a fast one does
ILP = GraphIlp(time_limit_seconds=IN_ANY_TIME)
TWO_SWEEPS = FRONTIER_ADVANCING + " of 2 sweeps"
# Where all schedules beat the persistent ones of EXAMPLES.
NOT_PERSISTENT = {("E4", 24): 100.0}


def solve(workload: Chain | Graph, budget: int) -> Solution | None:
    """A checked solution; None where nothing fits."""
    try:
        solution = ILP.solve(workload, budget)
    except InfeasibleBudgetError:
        return None
    assert simulate(workload, solution.schedule).timeline.tolist() == (
        solution.trace.timeline.tolist()
    )
    assert solution.trace.peak_bytes <= budget
    assert solution.lower_bound_seconds <= solution.trace.seconds
    assert solution.least_budget_bytes <= budget
    return solution


def seconds(workload: Chain | Graph, budget: int) -> float:
    """The least seconds that the program proves; infinite where nothing fits."""
    solution = solve(workload, budget)
    if solution is None:
        return math.inf
    assert solution.trace.seconds == pytest.approx(solution.lower_bound_seconds, rel=1e-6)
    return solution.trace.seconds


@pytest.mark.parametrize("name", EXAMPLES)
def test_worked_examples(name: str) -> None:
    chain, pairs = example(name), list(EXAMPLES[name][1].items())
    assert solve(chain, pairs[0][0] - 1) is None
    for budget, value in steps(pairs, pairs[-1][0] + 1):
        assert seconds(chain, budget) == NOT_PERSISTENT.get((name, budget), value)


def test_tiny_chains_against_all_schedules() -> None:
    cases = tiny_cases()
    grown = [x for x in cases if any(row[2] != row[3] for row in x["optimum"])]
    assert grown  # where a schedule that is not memory-persistent is best
    for case in (*cases[:8], *grown):
        chain = Chain.from_json(case["chain"])
        for budget, _, best, _ in case["optimum"]:
            assert seconds(chain, budget) == (math.inf if best is None else best)


def of_class(graph: Graph, budget: int, sweeps: int = 2) -> float:
    """Brute force over frontier-advancing schedules in all orders."""
    listed, complete = orders(graph, MOST_ORDERS)
    assert complete
    return min(cheapest_on_graph(order.graph, budget, sweeps=sweeps) for order in listed)


@pytest.mark.parametrize("case", [(53, 181.0), (46, 136.0)])
def test_no_optimum_is_cut_off(case: tuple[int, float]) -> None:
    # HiGHS 1.15 calls costlier solutions optimal here, unless its presolve is off.
    budget, best = case
    u_f, u_b, w_a, w_t, o_f, o_b = EASILY_MISSED[budget]
    data = {"u_f": u_f, "u_b": u_b, "w_a": w_a, "w_t": w_t, "o_f": o_f, "o_b": o_b}
    chain = Chain.from_json(data)
    assert seconds(chain, budget) == best  # the optimum of all schedules
    model = GraphModel(Graph.from_chain(chain), budget)
    assert model.bound(minimise(model.problem, time_limit_seconds=IN_ANY_TIME).bound) == best


def test_a_tape_keeps_the_state_that_it_was_made_from() -> None:
    # In 3 seconds if x1 could go once t1 has been made beside it, while t2 has the old x1.
    data = {"u_f": [1, 1], "u_b": [0, 0], "w_a": [0, 1, 0], "w_t": [2, 0], "w_g": [0, 6, 0]}
    chain = Chain.from_json(data | {"o_f": [5, 0], "o_b": [0, 0], "o_loss": 7})
    assert cheapest_pinned(chain, 8) == 4
    for sweeps in (1, 2):
        assert GraphIlp(IN_ANY_TIME, sweeps=sweeps).solve(chain, 8).trace.seconds == 4


@given(chains(most_stages=3), st.integers(0, 3))
@settings(max_examples=40)
def test_no_pinned_schedule_is_costlier(chain: Chain, more: int) -> None:
    # Nor cheaper: two sweeps suffice on chains as short as these.
    budget = least_budget(chain) + more
    assert seconds(chain, budget) == cheapest_pinned(chain, budget)


@pytest.mark.parametrize("budget", [50_000, 4 * 2**40])
def test_sizes_far_above_the_budget(budget: int) -> None:
    size = 2**40
    data = {"u_f": [1] * 4, "u_b": [1] * 4, "w_a": [0] + [size + 1] * 4, "w_t": [4 * size] * 4}
    data |= {"o_f": [0] * 4, "o_b": [0] * 4}
    with pytest.raises(InfeasibleBudgetError):
        GraphIlp(time_limit_seconds=0.01).solve(Chain.from_json(data), budget)


# Found by comparing random chains with all schedules.
EASILY_MISSED = {
    53: (
        [3, 9, 1, 7, 2, 10, 3],
        [2, 12, 15, 20, 18, 13, 2],
        [7, 1, 6, 8, 6, 7, 7, 8],
        [2, 8, 24, 13, 15, 9, 18],
        [1, 7, 1, 8, 6, 1, 5],
        [8, 1, 0, 7, 2, 3, 6],
    ),
    46: (
        [9, 4, 1, 9, 8, 2, 10],
        [10, 5, 5, 15, 3, 20, 2],
        [1, 6, 4, 2, 8, 1, 6, 6],
        [14, 13, 2, 24, 5, 6, 9],
        [3, 7, 5, 1, 0, 6, 1],
        [3, 2, 6, 7, 7, 1, 8],
    ),
}


@settings(max_examples=25, deadline=None)
@given(chains(most_stages=4), st.data())
def test_chains_against_brute_force(chain: Chain, data: st.DataObject) -> None:
    graph = Graph.from_chain(chain)
    top = simulate(graph, with_drops(graph, store_all_runs(graph))).peak_bytes
    budget = data.draw(st.integers(top // 3, top))
    assert seconds(chain, budget) == seconds(graph, budget) == of_class(graph, budget)
    assert cheapest_on_graph(graph, budget) <= of_class(graph, budget)
    model = GraphModel(graph, budget)
    outcome = minimise(model.problem, time_limit_seconds=IN_ANY_TIME)
    assert model.bound(outcome.bound) == of_class(graph, budget, sweeps=1)


@settings(max_examples=30, deadline=None)
@given(graphs(most_nodes=4), st.data())
def test_graphs_against_brute_force(graph: Graph, data: st.DataObject) -> None:
    top = simulate(graph, with_drops(graph, store_all_runs(graph))).peak_bytes
    budget = data.draw(st.integers(top // 3, top))
    assert seconds(graph, budget) == of_class(graph, budget)
    assert cheapest_on_graph(graph, budget) <= of_class(graph, budget)


@settings(max_examples=10, deadline=None)
@given(graphs(most_nodes=4))
def test_the_least_budget(graph: Graph) -> None:
    with pytest.raises(InfeasibleBudgetError) as caught:
        ILP.solve(graph, graph.held_bytes + graph.input_bytes - 1)
    least = caught.value.least_budget_bytes
    assert least is not None
    assert seconds(graph, least) == of_class(graph, least) < math.inf
    assert of_class(graph, least - 1) == math.inf


def without_common_unit(graph: Graph, factor: int, noise: list[int]) -> Graph:
    """The same with sizes so many times as large and a little more, which divide by nothing."""

    def size(stage: Stage, field: str, more: int) -> int:
        return int(getattr(stage, field)) * factor + more

    stages = [
        replace(
            stage,
            state_bytes=size(stage, "state_bytes", more),
            tape_bytes=size(stage, "tape_bytes", more + 3),
            gradient_bytes=size(stage, "gradient_bytes", 2 * more),
            forward_overhead_bytes=size(stage, "forward_overhead_bytes", more),
            backward_overhead_bytes=size(stage, "backward_overhead_bytes", 7),
        )
        for stage, more in zip(graph.stages, noise, strict=True)
    ]
    return replace(graph, stages=tuple(stages))


@settings(max_examples=10, deadline=None)
@given(graphs(most_nodes=4), st.lists(st.integers(0, 1000), min_size=4, max_size=4))
def test_budgets_within_rounding_of_the_least(graph: Graph, noise: list[int]) -> None:
    graph = without_common_unit(graph, 10**6 + 3, noise[: len(graph)])
    (few,) = ILP.solve_each(graph, [1])
    assert isinstance(few, InfeasibleBudgetError)
    least = few.least_budget_bytes
    assert least is not None
    near = range(least - 3, least + 3)
    for found, budget in zip(ILP.solve_each(graph, near), near, strict=True):
        best = of_class(graph, budget)
        if isinstance(found, Solution):
            assert found.trace.peak_bytes <= budget
            assert found.lower_bound_seconds <= best <= found.trace.seconds
        else:  # the message names what works, and no proof is claimed where there is none
            assert budget < least
            assert found.least_budget_bytes is not None
            assert budget < found.least_budget_bytes <= least
            assert best == math.inf or "was found for" in str(found)
    assert of_class(graph, int(least * 0.999)) == math.inf


def test_where_the_time_does_not_suffice_for_one_budget_the_others_are_answered() -> None:
    graph = two_branches(length=4)
    (few,) = GraphCuts().solve_each(graph, [1])
    assert isinstance(few, InfeasibleBudgetError)
    known = few.least_budget_bytes
    assert known is not None
    late, found, all_kept = GraphIlp(time_limit_seconds=1e-9).solve_each(
        graph, [known - 1, known, 10**6]
    )
    assert isinstance(late, InfeasibleBudgetError)
    assert (late.budget_bytes, late.least_budget_bytes) == (known - 1, known)
    assert f"found no schedule for {known - 1} B in 1e-09 seconds" in str(late)
    assert isinstance(found, Solution)
    assert found.lower_bound_seconds == graph.store_all_seconds
    assert isinstance(all_kept, Solution)
    assert all_kept.trace.seconds == graph.store_all_seconds


def test_one_sweep_is_not_everything() -> None:
    # x1 cannot be there while stage 3 runs, and stage 1 cannot run beside g3 or g2: it has to be
    # run again after stage 3, and before Turn.
    data = {"u_f": [1] * 3, "u_b": [0] * 3, "w_a": [0, 1, 1, 1], "w_t": [1] * 3}
    chain = Chain.from_json(data | {"w_g": [0, 0, 5, 5], "o_f": [17, 0, 18], "o_b": [0] * 3})
    graph = Graph.from_chain(chain)
    assert cheapest_on_graph(graph, 20, sweeps=1) == math.inf
    with pytest.raises(InfeasibleBudgetError):
        GraphIlp(IN_ANY_TIME, sweeps=1).solve(chain, 20)
    assert seconds(chain, 20) == cheapest_on_graph(graph, 20) == 5
    assert cheapest_pinned(chain, 20) == 5


def three_side_by_side() -> Graph:
    """Forwards need one order to fit, and backwards the same order, not its reverse."""

    def stage(name: str, forward: int, backward: int) -> Stage:
        return Stage(
            name=name,
            forward_seconds=1.0,
            backward_seconds=0.0,
            state_bytes=1,
            tape_bytes=1,
            gradient_bytes=1,
            forward_overhead_bytes=forward,
            backward_overhead_bytes=backward,
        )

    rows = (("a", 12, 7), ("b", 11, 9), ("c", 10, 11), ("sum", 0, 0))
    return Graph(stages=tuple(stage(*row) for row in rows), reads=((0,), (0,), (0,), (1, 2, 3)))


def test_two_sweeps_are_not_everything() -> None:
    graph = three_side_by_side()
    text = "T:a T:b T:c T:sum turn B:sum B:a B:b B:c -x:input"
    assert simulate(graph, graph.parse_schedule(text)).peak_bytes == 13
    assert cheapest_on_graph(graph, 13) == 4  # all that storing everything takes
    assert of_class(graph, 13, sweeps=2) == math.inf
    assert of_class(graph, 13, sweeps=3) == 4
    with pytest.raises(InfeasibleBudgetError) as caught:
        ILP.solve(graph, 13)
    assert caught.value.least_budget_bytes == 14
    assert GraphIlp(IN_ANY_TIME, sweeps=3).solve(graph, 13).trace.seconds == 4


@pytest.mark.parametrize("graph", [residual(2), u_net(), two_branches(2)])
def test_networks(graph: Graph) -> None:
    top = simulate(graph, with_drops(graph, store_all_runs(graph))).peak_bytes
    budgets = [int(top * share) for share in (1.0, 0.85, 0.7)]
    planned, merged = ILP.solve_each(graph, budgets), GraphCuts().solve_each(graph, budgets)
    gains = 0
    for a, b, budget in zip(planned, merged, budgets, strict=True):
        assert isinstance(a, Solution)
        assert isinstance(b, Solution)
        assert a.trace.peak_bytes <= budget
        assert a.lower_bound_seconds <= a.trace.seconds <= b.trace.seconds
        assert a.trace.seconds == pytest.approx(a.lower_bound_seconds, rel=1e-6)
        gains += a.trace.seconds < b.trace.seconds
    assert planned[0].schedule_class == "all schedules"  # type: ignore[union-attr]
    assert planned[2].schedule_class == TWO_SWEEPS  # type: ignore[union-attr]
    assert gains
    assert solve_graph(graph, budgets[2]) == planned[2]


def test_more_orders_than_are_tried() -> None:
    graph = two_branches(length=4)
    assert orders(graph, MOST_ORDERS)[1] is False
    top = simulate(graph, with_drops(graph, store_all_runs(graph))).peak_bytes
    solution = solve(graph, int(0.8 * top))
    assert solution is not None
    assert solution.schedule_class == TWO_SWEEPS + IN_ORDER


def test_a_better_order_is_found() -> None:
    graph = two_branches(length=2)
    # Counted across the branches, so that both lie open from end to end.
    across = reordered(graph, (0, 1, 3, 2, 4, 5, 6)).graph
    top = simulate(graph, with_drops(graph, store_all_runs(graph))).peak_bytes
    for budget in (int(share * top) for share in (0.45, 0.6, 0.75)):
        assert seconds(graph, budget) == seconds(across, budget)


@settings(max_examples=30, deadline=None)
@given(graphs(most_nodes=6), st.data())
def test_starts_are_the_runs_that_they_came_from(graph: Graph, data: st.DataObject) -> None:
    kept = data.draw(st.sets(st.integers(1, len(graph))))
    sweeps = data.draw(st.integers(1, 2))
    for runs in (store_all_runs(graph), on_demand_runs(graph, kept)):
        schedule = with_drops(graph, runs)
        model = GraphModel(graph, 1, sweeps=sweeps)
        start = model.start(schedule)
        assert start is not None
        for variable, value in start.items():
            variable.varValue = value
        assert with_drops(graph, model.runs()) == schedule


def test_starts_that_are_none() -> None:
    graph = Graph.from_chain(uniform(3))
    model = GraphModel(graph, 1)
    twice = Schedule.from_text("F1 F2 -x1 F1 T3 turn")
    assert model.start(twice) is None
    assert GraphModel(graph, 1, sweeps=2).start(twice) is not None
    assert GraphModel(two_branches(2), 1).start(Schedule.from_text("turn B6 B5 B2")) is None


@settings(max_examples=40, deadline=None)
@given(chains(most_stages=4), st.integers(0, 10**6))
def test_early_drops_never_need_more(chain: Chain, pick: int) -> None:
    graph = Graph.from_chain(chain)
    known = persistent_schedules(len(chain))
    schedule = known[pick % len(known)]
    runs = [operation for operation in schedule if "Drop" not in repr(operation)]
    early = with_drops(graph, runs)
    assert with_drops(graph, [x for x in early if "Drop" not in repr(x)]) == early
    before, after = simulate(graph, schedule), simulate(graph, early)
    assert after.peak_bytes <= before.peak_bytes
    assert after.seconds <= before.seconds


@pytest.mark.parametrize("factor", [7, 1_000_003])
def test_units_are_no_matter(factor: int) -> None:
    data = EXAMPLES["E4"][0]
    sizes = {key: [factor * x for x in data[key]] for key in ("w_a", "w_t")}
    for budget, value in ((24, 100.0), (25, 90.0), (32, 80.0), (37, 72.0)):
        assert seconds(Chain.from_json(data | sizes), factor * budget) == value
        assert seconds(Chain.from_json(data | sizes), factor * (budget + 1) - 1) == value
        times = {key: [0.0013 * x for x in data[key]] for key in ("u_f", "u_b")}
        found = seconds(Chain.from_json(data | times), budget)
        assert found == pytest.approx(0.0013 * value, rel=1e-12)


def test_a_byte_below_the_solvers_tolerance_counts() -> None:
    data = EXAMPLES["E4"][0]
    huge = 10**13
    sizes = {key: [huge * x for x in data[key]] for key in ("w_a", "w_t")}
    sizes["w_a"][0] += 1  # so that the sizes share no unit
    chain = Chain.from_json(data | sizes)
    solution = solve(chain, 25 * huge)  # 90 seconds need a byte more
    assert solution is not None
    assert solution.trace.seconds == 100
    assert solution.lower_bound_seconds <= 100
    assert seconds(chain, 25 * huge + 1) == 90


def test_an_optimum_that_fits_to_the_byte_is_not_lost() -> None:
    # One byte more lets store_all fit. With sizes that were no whole numbers of a unit HiGHS took
    # its solution for one that fits, refused it later, and called 25 seconds optimal.
    data = {"u_f": [8, 3, 0], "u_b": [0, 3, 3], "w_a": [0, 3, 6, 0], "w_t": [6, 12, 8]}
    data |= {"w_g": [5, 3, 6, 5], "o_f": [2, 1, 1], "o_b": [3, 0, 0], "w_p": [6, 5, 0]}
    noise = {"w_a": [0, 0, 5, 0], "w_t": [0, 5, 1], "w_g": [0, 0, 0, 1], "o_f": [3, 1, 2]}
    for key in ("w_a", "w_t", "w_g", "o_f", "o_b", "w_p"):
        more = noise.get(key, [0] * 4)
        data[key] = [x * (10**9 + 7) + y for x, y in zip(data[key], more, strict=False)]
    chain = Graph.from_chain(Chain.from_json(data | {"o_loss": 5 * (10**9 + 7)}))
    graph = replace(chain, reads=((0,), (1,), (1, 2)))
    top = GraphCuts().solve(graph, 10**12).trace.peak_bytes
    solution = GraphIlp(IN_ANY_TIME, sweeps=1).solve(graph, top - 1)
    assert solution.trace.seconds == 20 == cheapest_on_graph(graph, top - 1, sweeps=1)
    assert solution.lower_bound_seconds <= 20


def test_exact_bytes_are_kept_and_the_class_says_what_is_bounded() -> None:
    chain = Chain(stages=(exact_stage(),) * 5, held_bytes=10)
    least = ChainDp().solve(chain, 10**6).least_budget_bytes
    found = [solve(chain, budget) for budget in (2 * least, 4 * least)]
    assert found[0] is not None
    assert found[0].trace.ledger_peak_bytes is not None
    assert found[0].trace.ledger_peak_bytes <= 2 * least
    assert found[0].schedule_class == TWO_SWEEPS + ", in the planning model"


def larger_chain(n: int = 30) -> Chain:
    """A chain on which the program takes a while."""
    shapes = [exact_stage(parameter_gradient_bytes=i) for i in range(3)]
    stages = tuple(
        replace(
            shapes[i % 3],
            ledger=None,
            forward_seconds=1.0 + 0.37 * (i * i % 7),
            state_bytes=10 + i % 4,
            tape_bytes=25 + i * i % 17,
        )
        for i in range(n)
    )
    return Chain(stages=stages, input_bytes=10, input_gradient_bytes=10)


def test_a_time_limit_leaves_a_valid_bound() -> None:
    chain = larger_chain()
    budget = int(ChainDp().solve(chain, 10**6).trace.peak_bytes * 0.4)
    solution = GraphIlp(time_limit_seconds=0.01).solve(chain, budget)
    known = ChainDp().solve(chain, budget).trace.seconds
    assert solution.trace.peak_bytes <= budget
    assert chain.store_all_seconds <= solution.lower_bound_seconds <= solution.trace.seconds
    assert solution.trace.seconds <= known


def test_a_time_limit_without_a_solution() -> None:
    graph = two_branches(length=4)
    with pytest.raises(InfeasibleBudgetError) as least:
        GraphCuts().solve(graph, 1)
    budget = least.value.least_budget_bytes
    assert budget is not None
    with pytest.raises(SolverTimeoutError) as caught:
        GraphIlp(time_limit_seconds=1e-9).solve(graph, budget - 1)
    assert caught.value.limit_seconds == 1e-9
    message = str(caught.value)
    assert f"found no schedule for {budget - 1} B in 1e-09 seconds" in message
    assert f"a budget of {budget} B works" in message


def test_infeasible_budgets_name_the_least() -> None:
    with pytest.raises(InfeasibleBudgetError) as caught:
        ILP.solve(example("E4"), 20)
    assert (caught.value.budget_bytes, caught.value.least_budget_bytes) == (20, 24)
    assert "no frontier-advancing schedule fits a budget of 20 B" in str(caught.value)
    assert caught.value.stage == "stage 3"
    graph = u_net()
    with pytest.raises(
        InfeasibleBudgetError, match=r"limited by the backward of stage \d+ \('up0'\)"
    ):
        ILP.solve(graph, 100)


def test_what_it_does_not_take() -> None:
    with pytest.raises(WorkloadError, match=f"at most {MOST_NODES} nodes, found 151"):
        ILP.solve(uniform(151), 10**6)
    with pytest.raises(WorkloadError, match="one sweep or more, found 0"):
        GraphIlp(sweeps=0)
    for limit in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(WorkloadError, match="time limit of more than 0 seconds"):
            GraphIlp(time_limit_seconds=limit)


def test_large_graphs_are_searched_alone() -> None:
    graph = residual(blocks=60)
    assert len(graph) > MOST_NODES
    top = simulate(graph, with_drops(graph, store_all_runs(graph))).peak_bytes
    solution = solve_graph(graph, top // 2)
    assert solution.trace.peak_bytes <= top // 2


def test_results_are_the_same_again_and_nothing_is_printed(
    capfd: pytest.CaptureFixture[str],
) -> None:
    chain = larger_chain(8)
    budget = int(ChainDp().solve(chain, 10**6).trace.peak_bytes * 0.5)
    assert ILP.solve(chain, budget) == ILP.solve(chain, budget)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_ctrl_c_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(what: str, share: float) -> None:
        if what == "integer program of 30 nodes":
            raise KeyboardInterrupt

    chain = larger_chain()
    monkeypatch.setattr(graph_milp, "_POLL_SECONDS", 0.001)
    with pytest.raises(KeyboardInterrupt), listening(interrupt):
        ILP.solve(chain, 400)
    assert seconds(example("E4"), 24) == 100


@pytest.mark.skipif(
    not pulp.COIN_CMD(path=graph_milp.pulp_cbc_path).available(), reason="PuLP has no CBC here"
)
def test_cbc_gives_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(graph_milp, "highspy", None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for budget, value in ((23, math.inf), (24, 100.0), (32, 80.0)):
        assert seconds(example("E4"), budget) == value
    assert list(tmp_path.iterdir()) == []
