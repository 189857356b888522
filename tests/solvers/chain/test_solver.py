"""The dynamic program: equal to enumeration, never over budget, never beaten."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsched.base.errors import InfeasibleBudgetError, WorkloadError
from ckptsched.base.progress import listening
from ckptsched.simulator.simulator import simulate
from ckptsched.solvers import Baseline, ChainDp, Revolve, Solution, baselines_for
from ckptsched.solvers.binomial.revolve import advances, revolve_schedule
from ckptsched.solvers.chain.sizes import chain_sizes
from ckptsched.solvers.chain.solver import Effort
from ckptsched.solvers.chain.tables import Table, least_memory
from ckptsched.solvers.chain.to_schedule import outline
from ckptsched.workload.chain import Chain
from tests.oracles.brute_force import (
    cheapest,
    cheapest_of,
    persistent_frontier,
    persistent_schedules,
)
from tests.solvers.chain.answers import check_result, seconds_of
from tests.support.shared_chains import (
    EXAMPLES,
    WITHOUT_SEARCH,
    example,
    instance,
    reference,
    steps,
    tiny_cases,
    uniform,
)
from tests.support.strategies import (
    chains,
    chains_with_options,
    ledger_chains,
    scaled_chains,
    uniform_chains,
)


@pytest.mark.parametrize("name", EXAMPLES)
def test_worked_examples(name: str) -> None:
    chain, optimum = example(name), list(EXAMPLES[name][1].items())
    pairs = steps(optimum, optimum[-1][0] + 3)
    solutions = ChainDp().solve_each(chain, [budget for budget, _ in pairs])
    assert [seconds_of(solution) for solution in solutions] == [value for _, value in pairs]
    with pytest.raises(InfeasibleBudgetError) as caught:
        ChainDp().solve(chain, optimum[0][0] - 1)
    assert caught.value.least_budget_bytes == optimum[0][0]


def test_every_row_of_the_tiny_chains() -> None:
    cases = tiny_cases()
    assert len(cases) == 120
    for case in cases:
        chain = Chain.from_json(case["chain"])
        rows = [(row[0], math.inf if row[3] is None else row[3]) for row in case["optimum"]]
        pairs = steps(rows, rows[-1][0] + 2)
        results = ChainDp().solve_each(chain, [budget for budget, _ in pairs])
        assert [seconds_of(result) for result in results] == [value for _, value in pairs]
        for (budget, _), result in zip(pairs, results, strict=True):
            check_result(chain, budget, result)
            if isinstance(result, Solution):
                assert result.lower_bound_seconds == result.trace.seconds


def test_the_oracles_agree_with_the_tiny_chains() -> None:
    for case in [case for case in tiny_cases() if case["chain"]["n"] <= 4][:40]:
        chain = Chain.from_json(case["chain"])
        frontier = persistent_frontier(chain)
        for budget, unpinned, pinned, persistent in case["optimum"]:
            found = cheapest(chain, budget), cheapest(chain, budget, pinned=False)
            expected = [math.inf if x is None else x for x in (pinned, unpinned, persistent)]
            assert [*found] == expected[:2]
            assert cheapest_of(frontier, budget) == expected[2]


def test_the_oracle_enumerates_the_schroeder_numbers() -> None:
    assert [len(persistent_schedules(n)) for n in range(1, 6)] == [2, 6, 22, 90, 394]


@settings(max_examples=200, deadline=None)
@given(chains())
def test_equal_to_enumeration(chain: Chain) -> None:
    frontier = persistent_frontier(chain)
    budgets = sorted({peak + d for peak, _ in frontier for d in (-1, 0)})
    for budget, result in zip(budgets, ChainDp().solve_each(chain, budgets), strict=True):
        check_result(chain, budget, result)
        assert seconds_of(result) == cheapest_of(frontier, budget)
        assert seconds_of(result) >= cheapest(chain, budget)


@settings(max_examples=300, deadline=None)
@given(chains_with_options())
def test_equal_to_enumeration_with_several_tapes(chain: Chain) -> None:
    frontier = persistent_frontier(chain)
    budgets = sorted({peak + d for peak, _ in frontier for d in (-1, 0)})
    for budget, result in zip(budgets, ChainDp().solve_each(chain, budgets), strict=True):
        check_result(chain, budget, result)
        assert seconds_of(result) == cheapest_of(frontier, budget)
        assert seconds_of(result) >= cheapest(chain, budget)
        if isinstance(result, Solution):
            assert result.lower_bound_seconds == result.trace.seconds
    assert frontier[-1][1] == chain.store_all_seconds


@settings(max_examples=60, deadline=None)
@given(chains())
def test_a_tape_like_the_stages_own_changes_nothing(chain: Chain) -> None:
    twice = replace(chain, stages=tuple(replace(x, other_tapes=x.tapes) for x in chain.stages))
    peaks = [peak for peak, _ in persistent_frontier(chain)]
    pairs = zip(ChainDp().solve_each(chain, peaks), ChainDp().solve_each(twice, peaks), strict=True)
    for one, two in pairs:
        assert isinstance(one, Solution)
        assert isinstance(two, Solution)
        assert one.schedule == two.schedule


@settings(max_examples=60, deadline=None)
@given(scaled_chains(), st.integers(1, 60), st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_rounded_sizes(chain: Chain, slots: int, shares: list[float]) -> None:
    frontier = persistent_frontier(chain)
    least, most = frontier[0][0], frontier[-1][0]
    budgets = sorted({least - 1, least, most, *(int(least + x * (most - least)) for x in shares)})
    results = ChainDp(slots).solve_each(chain, budgets)
    for budget, result in zip(budgets, results, strict=True):
        check_result(chain, budget, result)
        optimum = cheapest_of(frontier, budget)
        assert seconds_of(result) >= optimum - 1e-9
        if isinstance(result, Solution):
            assert result.lower_bound_seconds <= optimum + 1e-9
            assert result.least_budget_bytes == least
    seconds = [seconds_of(result) for result in results]
    assert seconds == sorted(seconds, reverse=True)


@settings(max_examples=60, deadline=None)
@given(chains(most_stages=6), st.data())
def test_solve_answers_as_solve_each(chain: Chain, data: st.DataObject) -> None:
    most = Baseline("store_all").solve(chain, 10**9).trace.peak_bytes
    budget = data.draw(st.integers(0, most + 3))
    (result,) = ChainDp().solve_each(chain, [budget])
    if isinstance(result, Solution):
        assert ChainDp().solve(chain, budget).schedule == result.schedule
    else:
        with pytest.raises(InfeasibleBudgetError) as caught:
            ChainDp().solve(chain, budget)
        assert str(caught.value) == str(result)


@settings(max_examples=60, deadline=None)
@given(chains(most_stages=8) | ledger_chains(most_stages=8, noise=True))
def test_storing_everything_needs_no_second_run(chain: Chain) -> None:
    trace = Baseline("store_all").solve(chain, 10**9).trace
    solution = ChainDp().solve(chain, trace.peak_bytes)
    assert solution.trace.forwards == len(chain)
    assert solution.trace.seconds == pytest.approx(chain.store_all_seconds)
    assert solution.lower_bound_seconds == pytest.approx(chain.store_all_seconds)


@settings(max_examples=40, deadline=None)
@given(chains(most_stages=9) | ledger_chains(most_stages=9, noise=True) | uniform_chains())
def test_no_baseline_that_fits_is_cheaper(chain: Chain) -> None:
    methods = [*baselines_for(chain), *([Revolve()] if chain.is_uniform else [])]
    for method in methods:
        fixed = method.solve(chain, 10**9)
        found = ChainDp().solve(chain, fixed.trace.peak_bytes)
        assert found.trace.seconds <= fixed.trace.seconds + 1e-9


@pytest.mark.parametrize("states", range(1, 7))
@pytest.mark.parametrize("n", [1, 2, 5, 12, 23])
def test_uniform_chains_with_large_tapes_are_binomial(n: int, states: int) -> None:
    # A tape larger than all the states that fit beside it is never worth keeping.
    chain = uniform(n, state=1, tape=40)
    budget = simulate(chain, revolve_schedule(n, states)).peak_bytes
    found = ChainDp().solve(chain, budget)
    assert found.trace.seconds == Revolve().solve(chain, budget).trace.seconds
    assert found.trace.seconds == 2 * n + advances(n, states) + n
    assert found.lower_bound_seconds == found.trace.seconds


def test_sandwich_of_the_published_test_chain() -> None:
    # The published recurrence leaves out the gradient that a backward consumes: it lies
    # between no gradients at all and ours (RR-9302; values by exhaustive search).
    data = {
        "u_f": [2, 3, 1, 4, 2, 0],
        "u_b": [4, 6, 2, 8, 4, 0],
        "w_a": [2, 3, 1, 2, 1, 2, 0],
        "w_t": [6, 5, 4, 7, 4, 0],
    }
    rotor = [51, 48, 46, 45, 45, 44, 42, 42, 41, 41, 41, 40, 40, 39, 39, 38, 37, 37, 36]
    budgets = range(12, 12 + len(rotor))
    without = ChainDp().solve_each(Chain.from_json(data | {"w_g": [0] * 7}), budgets)
    ours = ChainDp().solve_each(Chain.from_json(data), budgets)
    for low, published, high in zip(without, rotor, ours, strict=True):
        assert seconds_of(low) <= published <= seconds_of(high)
    assert seconds_of(ChainDp().solve(Chain.from_json(data), 40)) == 36


@pytest.mark.parametrize(
    ("name", "worst"),
    [
        ("resnet50_b32", 1e-6),
        ("random_n20_s0", 1e-6),
        ("random_n50_s0", 1e-6),
        ("gpt96", 1e-5),
        ("random_n100_s0", 0.0005),
        ("ode_L8_Nt16", 1e-6),
        ("random_n200_s0", 0.0005),
        pytest.param("random_n500_s0", 0.002, marks=pytest.mark.slow),
        pytest.param("ode_L8_Nt64", 0.002, marks=pytest.mark.slow),
    ],
)
def test_reference_instances(name: str, worst: float) -> None:
    chain, rows = instance(name), reference(name)
    budgets = [row["budget_bytes"] for row in rows]
    results = ChainDp().solve_each(chain, budgets)
    for row, result in zip(rows, results, strict=True):
        check_result(chain, row["budget_bytes"], result)
        assert isinstance(result, Solution)
        relative = result.trace.seconds / chain.store_all_seconds
        assert row["lower_bound"] - 1e-6 <= relative <= row["best_known"] * (1 + worst)
        assert result.trace.seconds <= 1.006 * result.lower_bound_seconds
        bound = result.lower_bound_seconds / chain.store_all_seconds
        # The figures were made with 32-bit floats.
        assert bound <= row["best_known"] * (1 + 1e-5)
    seconds = [seconds_of(result) for result in results]
    assert seconds == sorted(seconds, reverse=True)


def test_the_least_budget_is_met_and_one_byte_less_is_refused() -> None:
    chain = instance("random_n50_s0")
    with pytest.raises(InfeasibleBudgetError) as caught:
        ChainDp().solve(chain, 1000)
    error = caught.value
    assert error.budget_bytes == 1000
    assert error.least_budget_bytes is not None
    assert f"the least that works is {error.least_budget_bytes / 2**20:.0f}"[:25] in str(error)
    assert f"({error.least_budget_bytes} bytes)" in str(error)
    assert error.stage.startswith("stage ")
    assert error.stage in str(error)
    solution = ChainDp().solve(chain, error.least_budget_bytes)
    assert solution.trace.peak_bytes == error.least_budget_bytes == solution.least_budget_bytes
    with pytest.raises(InfeasibleBudgetError):
        ChainDp().solve(chain, error.least_budget_bytes - 1)


@settings(max_examples=60, deadline=None)
@given(
    scaled_chains() | chains_with_options(),
    st.integers(1, 40),
    st.sampled_from([0.9, 1.0, 1.01, 1.1]),
    st.booleans(),
)
def test_drawn_schedules_fit_in_bytes(
    chain: Chain, slots: int, scale: float, nearest: bool
) -> None:
    sizes = chain_sizes(chain)
    least = least_memory(sizes)
    top = Baseline("store_all").solve(chain, 10**12).trace.peak_bytes - sizes.fixed
    table = Table(sizes, -(-top // slots) or 1, top, nearest=nearest)
    for m in np.linspace(least.total, max(top, least.total), 5).astype(np.int64):
        drawn = outline(least, int(m), table, scale)
        trace = simulate(chain, drawn.build())
        assert trace.peak_bytes <= int(m) + sizes.fixed
        assert chain.store_all_seconds + drawn.extra_seconds == pytest.approx(trace.seconds)


def test_a_table_of_nearest_sizes_helps_where_states_are_smaller_than_slots() -> None:
    # At one slot in 300 the states of most steps take less than a slot.
    chain, budget = instance("ode_L8_Nt16"), reference("ode_L8_Nt16")[7]["budget_bytes"]
    sizes, least = chain_sizes(chain), least_memory(chain_sizes(chain))
    m = budget - sizes.fixed
    seconds = [
        min(
            outline(least, m, Table(sizes, m // 300, m, nearest=nearest), scale).extra_seconds
            for scale in (0.97, 0.98, 0.99, 1.0)
        )
        for nearest in (False, True)
    ]
    assert seconds[1] < seconds[0]
    both = ChainDp(slots=300, effort=WITHOUT_SEARCH).solve(chain, budget)
    effort = replace(WITHOUT_SEARCH, poor=math.inf)
    one = ChainDp(slots=300, effort=effort).solve(chain, budget)
    assert both.trace.seconds < one.trace.seconds
    assert both.lower_bound_seconds == one.lower_bound_seconds


def test_solving_twice_gives_the_same_schedule() -> None:
    chain = instance("resnet50_b32")
    budget = reference("resnet50_b32")[3]["budget_bytes"]
    assert ChainDp().solve(chain, budget) == ChainDp().solve(chain, budget)


def test_long_chains_are_refused() -> None:
    with pytest.raises(WorkloadError, match=r"up to about 1,700 stages, found 8000"):
        ChainDp().solve(uniform(8000), 10**9)


@settings(max_examples=100, deadline=None)
@given(
    st.one_of(scaled_chains(), chains_with_options(), ledger_chains(noise=True)),
    st.integers(1, 40),
)
def test_a_coarse_table_bounds_every_schedule(chain: Chain, slots: int) -> None:
    frontier, sizes = persistent_frontier(chain), chain_sizes(chain)
    top = max(0, frontier[-1][0] - sizes.fixed)
    for exact in (False, True):
        table = Table(sizes, max(1, top // slots), top, exact=exact)
        for peak, seconds in frontier:
            for budget in (peak, peak + 1):
                bound = chain.store_all_seconds + table.bound(budget - sizes.fixed)
                assert bound <= seconds * (1 + 1e-15)


def test_bounds_in_short_floats_stay_below_those_in_long_ones() -> None:
    chain = instance("random_n50_s0")
    sizes = chain_sizes(chain)
    top = Baseline("store_all").solve(chain, 10**15).trace.peak_bytes - sizes.fixed
    short, long = (Table(sizes, top // 300, top, exact=exact) for exact in (False, True))
    known = [x for x in range(0, top, top // 100) if not math.isinf(long.bound(x))]
    assert len(known) > 80
    for size in known:
        assert short.bound(size) <= long.bound(size)
        assert short.bound(size) == pytest.approx(long.bound(size), rel=1e-4)


@settings(max_examples=40, deadline=None)
@given(chains(most_stages=6) | chains_with_options() | ledger_chains(views=False))
def test_a_frontier_is_the_plan_at_each_of_its_budgets(chain: Chain) -> None:
    budgets = [peak for peak, _ in persistent_frontier(chain)] if len(chain) <= 4 else [40, 60, 80]
    together = ChainDp().solve_each(chain, budgets)
    for budget, result in zip(budgets, together, strict=True):
        (alone,) = ChainDp().solve_each(chain, [budget])
        assert seconds_of(alone) == seconds_of(result)
        if isinstance(alone, Solution) and isinstance(result, Solution):
            assert alone.lower_bound_seconds == result.lower_bound_seconds


def test_a_frontier_of_rounded_sizes_is_no_worse_than_its_plans() -> None:
    chain = instance("random_n50_s0")
    budgets = [row["budget_bytes"] for row in reference("random_n50_s0")]
    for budget, result in zip(budgets, ChainDp().solve_each(chain, budgets), strict=True):
        alone = ChainDp().solve(chain, budget)
        assert isinstance(result, Solution)
        assert result.trace.seconds <= alone.trace.seconds
        assert result.lower_bound_seconds <= alone.lower_bound_seconds
        assert result.rounding_unit_bytes == alone.rounding_unit_bytes


def test_too_little_memory_means_larger_slots_then_an_error() -> None:
    chain = instance("random_n50_s0")
    budget = reference("random_n50_s0")[3]["budget_bytes"]
    fine = ChainDp(effort=WITHOUT_SEARCH).solve(chain, budget)
    coarse = ChainDp(effort=replace(WITHOUT_SEARCH, numbers=1e5)).solve(chain, budget)
    assert coarse.rounding_unit_bytes > 10 * fine.rounding_unit_bytes
    assert coarse.lower_bound_seconds < fine.lower_bound_seconds
    assert fine.trace.seconds <= coarse.trace.seconds * (1 + 1e-9)
    check_result(chain, budget, coarse)
    message = r"50 stages would need .* for 100 slots, more than the 39\.063 KiB"
    with pytest.raises(WorkloadError, match=message):
        ChainDp(effort=Effort(numbers=1e4)).solve(chain, budget)


def test_a_long_computation_tells_its_progress_and_can_be_stopped() -> None:
    chain = instance("random_n50_s0")
    budget = reference("random_n50_s0")[3]["budget_bytes"]
    told: list[tuple[str, float]] = []
    with listening(lambda what, share: told.append((what, share))):
        ChainDp().solve(chain, budget)
    tables = [share for what, share in told if what.startswith("table of 50 stages and ")]
    assert tables == sorted(tables)
    assert tables[0] == 0
    assert tables[-1] == pytest.approx(1)

    def stop(what: str, share: float) -> None:
        if share > 0.2 and what.startswith("table"):
            raise KeyboardInterrupt

    with listening(stop), pytest.raises(KeyboardInterrupt):
        ChainDp().solve(chain, budget)


def test_slots_must_be_positive() -> None:
    with pytest.raises(WorkloadError, match="at least one slot, found 0"):
        ChainDp(slots=0)
