"""Binomial schedules: the closed form, published values, and the most states that fit."""

from __future__ import annotations

import functools
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ckptsched.base import jit
from ckptsched.base.errors import InfeasibleBudgetError, WorkloadError
from ckptsched.base.jit import suited
from ckptsched.simulator.simulator import simulate
from ckptsched.solvers import Revolve
from ckptsched.solvers.binomial import revolve_kernel
from ckptsched.solvers.binomial.revolve import (
    advances,
    first_advance,
    repetitions,
    revolve_schedule,
)
from ckptsched.solvers.runs import table_kernel as run_kernel
from ckptsched.workload.chain import Chain
from tests.support.shared_chains import exact_stage, tiny_cases, uniform
from tests.support.strategies import uniform_chains

# (l, s): r and t(l, s) of Griewank and Walther.
VALUES = {
    (10, 3): (2, 15),
    (10, 1): (9, 45),
    (10, 4): (2, 14),
    (10, 10): (1, 9),
    (20, 4): (3, 39),
    (56, 5): (3, 140),
    (100, 3): (7, 490),
    (100, 5): (4, 316),
    (100, 10): (3, 222),
    (1000, 5): (8, 6284),
    (1000, 10): (4, 3636),
    (1000, 20): (3, 2747),
    (10_000, 10): (7, 57_624),
    (10_000, 20): (4, 37_976),
}
# t(l, s) for s = 1 .. 6.
ROWS = {
    2: [1, 1, 1, 1, 1, 1],
    3: [3, 2, 2, 2, 2, 2],
    4: [6, 4, 3, 3, 3, 3],
    5: [10, 6, 5, 4, 4, 4],
    6: [15, 8, 7, 6, 5, 5],
    8: [28, 14, 11, 10, 9, 8],
    10: [45, 20, 15, 14, 13, 12],
    12: [66, 28, 21, 18, 17, 16],
}


@functools.cache
def table(length: int, states: int) -> int:
    """t(l, s) by its recurrence."""
    if length == 1:
        return 0
    if states == 1:
        return length * (length - 1) // 2
    return min(i + table(i, states) + table(length - i, states - 1) for i in range(1, length))


@pytest.mark.parametrize(("length", "states"), VALUES)
def test_published_values(length: int, states: int) -> None:
    assert (repetitions(length, states), advances(length, states)) == VALUES[length, states]
    schedule = revolve_schedule(length, states)
    assert int((schedule.codes <= 1).sum()) == VALUES[length, states][1] + length


@pytest.mark.parametrize("length", ROWS)
def test_published_rows(length: int) -> None:
    assert [advances(length, states) for states in range(1, 7)] == ROWS[length]


def test_the_closed_form_is_the_recurrence() -> None:
    for length in range(1, 40):
        for states in range(1, 12):
            assert advances(length, states) == table(length, states)


def test_published_first_advances() -> None:
    assert first_advance(10, 3) == 4
    assert first_advance(100, 10) == 11
    assert first_advance(1000, 10) in (285, 286)
    assert first_advance(10_000, 20) in (1770, 1771)


def test_the_first_advance_is_optimal() -> None:
    for length in range(2, 200):
        for states in range(2, 15):
            i = first_advance(length, states)
            rest = advances(length - i, states - 1)
            assert i + advances(i, states) + rest == advances(length, states)


def test_schedules_of_all_shapes_are_valid_and_optimal() -> None:
    for length in range(1, 25):
        for states in range(1, length + 2):
            trace = simulate(uniform(length), revolve_schedule(length, states))
            assert trace.forwards == advances(length, states) + length


@pytest.mark.parametrize("states", [2, 3, 5, 10, 33, 100])
def test_the_closed_form_is_the_optimum_up_to_10_000_stages(states: int) -> None:
    # The recurrence over all splits, in slots of one state; a tape takes more than there is.
    values = np.empty((states + 2, 10_001), np.float32)
    limits = (1, 1000, 1, 1, 1)
    run_kernel.fill_in_run(values, 10_000, limits, 1.0, True, 0, states + 1)
    closed = [advances(length, states) for length in range(1, 10_001)]
    assert values[states + 1, 1:].tolist() == closed


def test_the_compiled_schedule_is_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "LOADED_STEPS", 1)
    interpreted = suited(revolve_kernel.write_out, 1)
    for length in range(1, 40):
        for states in range(1, length + 2):
            operations = np.empty((2, 2 * (advances(length, states) + length + 1)), np.int64)
            for k, write_out in enumerate((revolve_kernel.write_out, interpreted)):
                assert write_out(length, states, operations[k]) == operations.shape[1]
            assert (operations[0] == operations[1]).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 10_000), st.integers(1, 100))
def test_long_schedules_are_optimal(length: int, states: int) -> None:
    assume(advances(length, states) <= 10**6)
    trace = simulate(uniform(length), revolve_schedule(length, states))
    assert trace.forwards == advances(length, states) + length
    assert trace.peak_bytes <= uniform_peak(states)


def uniform_peak(states: int) -> int:
    """States, a tape of four and two gradients, and what a sweep or the last state takes."""
    return states + 7


def test_a_schedule_word_by_word() -> None:
    assert revolve_schedule(4, 2).to_text() == (
        "F1 F2 F3 -x2 T4 turn B4 -x3 F2 T3 B3 -x2 T2 B2 -x1 T1 B1 -x0"
    )


def test_counts_of_the_published_package() -> None:
    package = pytest.importorskip("checkpoint_schedules")
    for length, states in [(5, 1), (10, 3), (20, 4), (56, 5), (100, 10), (1000, 10)]:
        schedule = package.MultistageCheckpointSchedule(length, states, 0)
        count = 0
        for action in schedule:
            if isinstance(action, package.Forward):
                count += action.n1 - action.n0
            if isinstance(action, package.EndReverse):
                break
        assert count == advances(length, states) + length


@settings(max_examples=60, deadline=None)
@given(uniform_chains(), st.data())
def test_the_most_states_that_fit_are_kept(chain: Chain, data: st.DataObject) -> None:
    n = len(chain)
    traces = [simulate(chain, revolve_schedule(n, states)) for states in range(1, n + 1)]
    least = min(trace.peak_bytes for trace in traces)
    budget = data.draw(st.integers(max(least - 2, 0), traces[-1].peak_bytes + 2))
    fitting = [trace.seconds for trace in traces if trace.peak_bytes <= budget]
    if fitting:
        solution = Revolve().solve(chain, budget)
        assert solution.trace.peak_bytes <= budget
        assert solution.trace.seconds == solution.lower_bound_seconds == min(fitting)
        assert solution.schedule_class == "binomial (states and one tape)"
        assert solution.least_budget_bytes == least
    else:
        with pytest.raises(InfeasibleBudgetError) as caught:
            Revolve().solve(chain, budget)
        assert caught.value.least_budget_bytes == least


@pytest.mark.parametrize("random_state", [0, 7])
def test_exact_bytes_decide(random_state: int) -> None:
    n = 15
    chain = Chain(stages=(exact_stage(),) * n, held_bytes=10, random_state_bytes=random_state)
    peaks = [simulate(chain, revolve_schedule(n, s)).peak_bytes for s in range(1, n + 1)]
    assert peaks == sorted(peaks)
    for budget in range(peaks[0], peaks[-1] + 1):
        solution = Revolve().solve(chain, budget)
        states = max(s for s in range(1, n + 1) if peaks[s - 1] <= budget)
        assert solution.trace.forwards == advances(n, states) + n


def test_other_chains_are_refused() -> None:
    with pytest.raises(WorkloadError, match="equal seconds and bytes; for others use chain_dp"):
        Revolve().solve(Chain.from_json(tiny_cases()[0]["chain"]), 100)


def test_the_message_names_the_least_budget() -> None:
    chain = uniform(30, state=1000, tape=9000)
    with pytest.raises(InfeasibleBudgetError, match="no binomial schedule fits") as caught:
        Revolve().solve(chain, 12_000)
    assert caught.value.least_budget_bytes == 13_000
    solution = Revolve().solve(chain, 13_000)
    assert solution.trace.forwards == 30 * 31 // 2
    assert solution.least_budget_bytes == 13_000


def test_a_hundred_thousand_stages_without_recursion() -> None:
    tracemalloc.start()
    schedule = revolve_schedule(100_000, 100)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert int((schedule.codes <= 1).sum()) == advances(100_000, 100) + 100_000
    assert schedule.nbytes < 8 * 10**6
    assert peak < 40 * 10**6


def test_a_long_chain_within_a_budget() -> None:
    chain = uniform(10_000, state=100, tape=1000)
    solution = Revolve().solve(chain, 100 * 100 + 1300)
    assert solution.trace.peak_bytes == 100 * 100 + 1300
    assert solution.trace.forwards == advances(10_000, 100) + 10_000
    # One state takes 50 million runs, too many to be offered; two are the fewest.
    assert solution.least_budget_bytes == 2 * 100 + 1300


def test_inferred_peaks_find_the_same_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = uniform(60, state=3, tape=8)
    budgets = range(4 * 3 + 8, 220, 7)
    simulated = [Revolve().solve(chain, budget) for budget in budgets]
    monkeypatch.setattr("ckptsched.solvers.binomial.revolve._SIMULATED_ADVANCES", 0)
    assert [Revolve().solve(chain, budget) for budget in budgets] == simulated


def test_parameter_gradients_and_input_of_another_size_count() -> None:
    chain = uniform(12)
    last = replace(chain.stages[-1], parameter_gradient_bytes=5)
    shared = replace(chain, stages=(*chain.stages[:-1], last), input_bytes=7)
    for budget in range(19, 40):
        solution = Revolve().solve(shared, budget)
        assert solution.trace.peak_bytes <= budget


@pytest.mark.parametrize("stage", [0, 5, 10])
def test_parameter_gradients_before_the_last_stage_are_refused(stage: int) -> None:
    # The peak then depends on which stages run while which states are kept.
    stages = list(uniform(12).stages)
    stages[stage] = replace(stages[stage], parameter_gradient_bytes=5)
    with pytest.raises(WorkloadError, match="equal seconds and bytes"):
        Revolve().solve(replace(uniform(12), stages=tuple(stages)), 100)


def test_the_least_budget_is_simulated_and_works() -> None:
    # A sweep takes more than anything else: inferred from many states, which need no sweep of two
    # stages, the least would be too small.
    stage = replace(uniform(1).stages[0], forward_overhead_bytes=20)
    chain = replace(uniform(600), stages=(stage,) * 600)
    least = Revolve().solve(chain, 10**6).least_budget_bytes
    assert Revolve().solve(chain, least).trace.peak_bytes == least
    with pytest.raises(InfeasibleBudgetError) as caught:
        Revolve().solve(chain, least - 1)
    assert caught.value.least_budget_bytes == least


def test_several_budgets_give_what_one_gives() -> None:
    chain = uniform(60, state=3, tape=8)
    budgets = [220, 10, 50, 50]
    found = Revolve().solve_each(chain, budgets)
    assert isinstance(found[1], InfeasibleBudgetError)
    for budget, result in zip(budgets, found, strict=True):
        if not isinstance(result, InfeasibleBudgetError):
            assert result == Revolve().solve(chain, budget)
