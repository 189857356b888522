"""Chains with runs of equal stages: plans against the full recurrence, and the lower bound."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ckptsched.base.errors import InfeasibleBudgetError, WorkloadError
from ckptsched.base.progress import listening
from ckptsched.fitting.planning import plan
from ckptsched.simulator.simulator import simulate
from ckptsched.solvers import ChainDp, Revolve, RunDp, Solution
from ckptsched.solvers.chain.sizes import chain_sizes
from ckptsched.solvers.runs import lower_bound as run_bound
from ckptsched.solvers.runs import solver as run_dp
from ckptsched.solvers.runs import table_kernel as run_kernel
from ckptsched.solvers.runs.find_runs import chain_runs
from ckptsched.solvers.runs.lower_bound import RunBound
from ckptsched.solvers.runs.solver import takes
from ckptsched.solvers.runs.step_groups import group
from ckptsched.solvers.runs.tables import RunTable
from ckptsched.solvers.runs.to_schedule import lower
from ckptsched.workload.chain import Chain
from ckptsched.workload.stage import Stage
from tests.support.shared_chains import INSTANCES, tiny_cases, uniform
from tests.support.strategies import ledger_chains, stages

SMALL = st.integers(0, 6)


@st.composite
def run_chains(draw: st.DrawFn, shortest: int = 4, longest: int = 7, factor: int = 1) -> Chain:
    """A few different stages, each several times in a row; sizes are multiples of a factor."""
    links: list[Stage] = []
    for stage in draw(st.lists(stages(), min_size=1, max_size=3)):
        plain = replace(stage, parameter_gradient_bytes=0)
        count = draw(st.integers(shortest, longest))
        links += [plain] * (count - 1) + [stage if draw(st.booleans()) else plain]
    data = Chain(
        stages=tuple(links),
        input_bytes=draw(SMALL),
        input_gradient_bytes=draw(SMALL),
        loss_seconds=draw(SMALL.map(float)),
        loss_overhead_bytes=draw(SMALL),
        held_bytes=draw(SMALL),
    ).to_json()
    for key in ("w_a", "w_t", "w_g", "o_f", "o_b", "w_p"):
        data[key] = [factor * x for x in data[key]]
    for key in ("o_loss", "w_held"):
        data[key] *= factor
    chain = Chain.from_json(data)
    assume(takes(chain))
    return chain


def all_budgets(chain: Chain, number: int = 10) -> list[int]:
    """Budgets from below the least of all to what storing everything takes."""
    top = RunDp().solve(chain, 10**12).trace.peak_bytes
    return sorted({max(1, round(top * k / number)) for k in range(1, number + 1)})


@settings(max_examples=20, deadline=None)
@given(run_chains())
def test_short_runs_are_planned_as_the_full_recurrence_does(chain: Chain) -> None:
    # Equal neighbours are one run: of more than eight stages not all places are looked at.
    assume(max(chain_runs(chain_sizes(chain)).plan.count) <= 8)
    budgets = all_budgets(chain)
    found, best = RunDp().solve_each(chain, budgets), ChainDp().solve_each(chain, budgets)
    for budget, mine, other in zip(budgets, found, best, strict=True):
        assert isinstance(mine, Solution) == isinstance(other, Solution)
        assert mine.least_budget_bytes == other.least_budget_bytes
        if isinstance(mine, Solution) and isinstance(other, Solution):
            assert simulate(chain, mine.schedule) == mine.trace
            assert mine.trace.peak_bytes <= budget
            assert mine.trace.seconds == pytest.approx(other.trace.seconds, rel=1e-6)
            assert mine.lower_bound_seconds <= other.trace.seconds * (1 + 1e-9)


@settings(max_examples=20, deadline=None)
@given(run_chains(shortest=8, longest=20), st.integers(2, 50))
def test_a_coarse_grid_loses_little_and_the_bound_holds(chain: Chain, unit: int) -> None:
    # Sizes in bytes have no common divisor then that is not small beside them.
    data = chain.to_json()
    data["w_t"] = [unit * x for x in data["w_t"]]
    chain = Chain.from_json(data)
    budgets = all_budgets(chain)
    best = ChainDp().solve_each(chain, budgets)
    runs = chain_runs(chain_sizes(chain))
    fixed = chain_sizes(chain).fixed
    bound = RunBound(runs.bound, budgets[-1] - fixed, 1)
    table = RunTable(runs.plan, 1, budgets[-1] - fixed, ends=2, starts=2)
    base = chain.store_all_seconds
    for budget, other in zip(budgets, best, strict=True):
        if not isinstance(other, Solution):
            assert math.isinf(table.extra_seconds[max(budget - fixed, 0)]) or budget < fixed
            continue
        bound.raise_at(budget - fixed, base, np.ones(len(runs.bound)))
        extra = bound.extra_seconds(budget - fixed)
        assert base + extra <= other.trace.seconds * (1 + 1e-9)
        if math.isfinite(table.extra_seconds[budget - fixed]):
            trace = simulate(chain, lower(table, budget - fixed))
            assert trace.peak_bytes <= budget
            seconds = base + float(table.extra_seconds[budget - fixed])
            assert trace.seconds == pytest.approx(seconds, rel=1e-5)
            assert trace.seconds >= other.trace.seconds * (1 - 1e-9)


@settings(max_examples=20, deadline=None)
@given(run_chains(shortest=8, longest=14), st.integers(4, 60))
def test_the_bound_holds_in_coarse_slots_too(chain: Chain, slots: int) -> None:
    # Kept states and tapes are then counted by the slots that many of them fill.
    sizes = chain_sizes(chain)
    runs = chain_runs(sizes)
    budgets = [x for x in all_budgets(chain, 6) if x > sizes.fixed]
    best = ChainDp().solve_each(chain, budgets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_bound, "_SLOTS", slots)
        for budget, other in zip(budgets, best, strict=True):
            bound = RunBound(runs.bound, budget - sizes.fixed, 1)
            bound.raise_at(budget - sizes.fixed, chain.store_all_seconds, np.ones(len(runs.bound)))
            if isinstance(other, Solution):
                extra = bound.extra_seconds(budget - sizes.fixed)
                assert chain.store_all_seconds + extra <= other.trace.seconds * (1 + 1e-9)


@pytest.mark.parametrize("tape", [1, 4])
def test_splits_near_the_best_are_nearly_all_that_matter(tape: int) -> None:
    limits = (1, tape, tape + 2, 3, 4)
    exact, near = (np.empty((tape + 40, 3001), np.float32) for _ in range(2))
    run_kernel.fill_in_run(exact, 3000, limits, 1.0, True, 0, tape + 39)
    run_kernel.fill_in_run(near, 3000, limits, 1.0, False, 0, tape + 39)
    assert (np.isinf(near) == np.isinf(exact)).all()
    fits = np.isfinite(exact)
    assert (near[fits] >= exact[fits]).all()
    assert (near[fits] <= 1.002 * exact[fits]).all()


@settings(max_examples=20, deadline=None)
@given(
    keep=st.integers(1, 4),
    tape=st.integers(1, 5),
    taped=st.integers(0, 6),
    alone=st.integers(0, 6),
    count=st.integers(1, 40),
)
def test_all_splits_of_equal_stages_are_tried(
    keep: int, tape: int, taped: int, alone: int, count: int
) -> None:
    limits, top = (keep, tape, taped, alone, alone + 1), 30
    found = np.empty((top + 1, count + 1), np.float32)
    run_kernel.fill_in_run(found, count, limits, 1.0, True, 0, top)
    for m in range(top + 1):
        for x in range(1, count + 1):
            expected = math.inf
            if m >= taped and (x == 1 or m >= tape):
                expected = 0.0 if x == 1 else float(found[m - tape, x - 1])
            most = x - 1 if m >= alone + 1 else 1 if m >= alone else 0
            for i in range(1, min(most, x - 1) + 1) if m >= max(keep, taped) else ():
                expected = min(expected, i + float(found[m, i]) + float(found[m - keep, x - i]))
            assert found[m, x] == expected, (m, x)


@settings(max_examples=10, deadline=None)
@given(run_chains(shortest=5, longest=12, factor=1_000_003), st.data())
def test_rounded_sizes_keep_the_budget(chain: Chain, data: st.DataObject) -> None:
    stage = chain.stages[0]
    odd = replace(stage, state_bytes=stage.state_bytes + 1, tape_bytes=stage.tape_bytes + 17)
    links = tuple(odd if x == stage else x for x in chain.stages)
    chain = replace(chain, stages=links)
    least = RunDp().solve(chain, 10**12).least_budget_bytes
    top = RunDp().solve(chain, 10**12).trace.peak_bytes
    budgets = sorted({data.draw(st.integers(least, max(top, least))) for _ in range(4)} | {least})
    found = RunDp().solve_each(chain, budgets)
    known = math.inf
    for budget, mine in zip(budgets, found, strict=True):
        assert isinstance(mine, Solution)
        assert simulate(chain, mine.schedule).peak_bytes <= budget
        assert mine.lower_bound_seconds <= mine.trace.seconds <= known
        known = mine.trace.seconds


@settings(max_examples=10, deadline=None)
@given(ledger_chains(most_stages=2, noise=True), st.integers(4, 8), st.data())
def test_exact_bytes_keep_the_budget(chain: Chain, times: int, data: st.DataObject) -> None:
    links = tuple(
        replace(x, parameter_gradient_bytes=0) for x in chain.stages for _ in range(times)
    )
    chain = replace(chain, stages=links, blocks=(), held_bytes=chain.held_bytes)
    assume(takes(chain))
    solution = RunDp().solve(chain, 10**12)
    least, top = solution.least_budget_bytes, solution.trace.peak_bytes
    budgets = sorted({data.draw(st.integers(least, max(top, least))) for _ in range(3)} | {least})
    found = RunDp().solve_each(chain, budgets)
    optima = ChainDp().solve_each(chain, budgets)
    for budget, mine, other in zip(budgets, found, optima, strict=True):
        assert isinstance(mine, Solution)
        assert simulate(chain, mine.schedule).peak_bytes <= budget
        if isinstance(other, Solution):
            assert mine.lower_bound_seconds <= other.trace.seconds * (1 + 1e-9)


@settings(max_examples=20, deadline=None)
@given(run_chains(shortest=1, longest=9), st.data())
def test_groups_of_stages_are_written_out_in_stages(chain: Chain, data: st.DataObject) -> None:
    runs = chain_runs(chain_sizes(chain)).plan

    sizes = np.array([data.draw(st.integers(1, 4)) for _ in range(len(runs))])
    groups = group(runs, np.minimum(sizes, runs.count))
    assert groups.last[-1] == len(chain)
    top = ChainDp().solve(chain, 10**12).trace.peak_bytes - chain_sizes(chain).fixed
    table = RunTable(groups.runs, 1, top, ends=8, starts=8)
    slots = np.flatnonzero(np.isfinite(table.extra_seconds))
    for m in {int(slots[0]), int(slots[len(slots) // 2]), top}:
        trace = simulate(chain, groups.expand(lower(table, m)))
        extra = float(table.extra_seconds[m])
        assert trace.seconds == pytest.approx(chain.store_all_seconds + extra, rel=1e-5)


@pytest.mark.parametrize("tape", [1, 2, 13])
@pytest.mark.parametrize(("stages_", "states"), [(60, 3), (500, 10), (2000, 30)])
def test_uniform_chains_are_no_costlier_than_binomial(stages_: int, states: int, tape: int) -> None:
    chain = uniform(stages_, state=1, tape=tape)
    budget = Revolve().solve(chain, 10**6).least_budget_bytes + states - 1
    binomial = Revolve().solve(chain, budget)
    solution = RunDp().solve(chain, budget)
    assert solution.trace.peak_bytes <= budget
    assert solution.trace.forwards <= binomial.trace.forwards
    # Segments of one run are tried with every split, and the bound is the convex hull of that.
    assert solution.trace.seconds <= solution.lower_bound_seconds * 1.005


def mixed_runs(length: int, slots: int) -> int:
    """Forward runs of the published schedule that keeps a state or a tape in each slot."""
    package = pytest.importorskip("checkpoint_schedules")
    count = 0
    storage = package.StorageType.DISK
    for action in package.MixedCheckpointSchedule(length, slots, storage=storage):
        if isinstance(action, package.Forward):
            count += action.n1 - action.n0
        if isinstance(action, package.EndReverse):
            break
    return count


@pytest.mark.parametrize("length", [2, 3, 5, 10, 37, 100, 300])
def test_states_or_tapes_in_equal_slots_are_as_published(length: int) -> None:
    chain = uniform(length, state=1, tape=1)
    slots = [s for s in (1, 2, 3, 4, 5, 8, 13, 30) if s < length]
    # Beside the slots: the tape that is reversed, both gradients, and the state before.
    found = RunDp().solve_each(chain, [s + 4 for s in slots])
    for s, mine in zip(slots, found, strict=True):
        assert isinstance(mine, Solution)
        assert mine.trace.forwards == mixed_runs(length, s)


def test_ten_thousand_stages_with_tapes() -> None:
    chain = uniform(10_000, state=1, tape=1)
    solution = RunDp().solve(chain, 104)
    assert solution.trace.forwards == 24_900  # as Mixed; the binomial schedule has 34,747
    assert solution.trace.seconds <= solution.lower_bound_seconds * 1.0001


@pytest.mark.parametrize("tape", [1, 4])
def test_auto_asks_run_dp_however_long_a_uniform_chain_is(tape: int) -> None:
    chain = uniform(30_000, state=1, tape=tape)
    found = plan(chain, budget=104, cache=False)
    assert found.solver == "run_dp"
    assert found.trace.peak_bytes <= 104
    assert found.trace.forwards < Revolve().solve(chain, 104).trace.forwards
    assert found.schedule_class != "binomial (states and one tape)"
    assert found.trace.seconds <= found.lower_bound_seconds * 1.001


@pytest.mark.parametrize("budget", [2_500, 5_000, 9_000])
def test_states_of_a_byte_in_slots_of_several(budget: int) -> None:
    # A group's state is rounded to nothing there, so it must be small beside the group's tapes.
    chain = uniform(10_000, state=1, tape=1)
    solution = RunDp().solve(chain, budget)
    assert solution.rounding_unit_bytes > 1
    assert solution.trace.peak_bytes <= budget
    assert solution.trace.seconds <= solution.lower_bound_seconds * 1.01


def test_a_chain_too_long_for_its_tables_is_refused_before_they_are_made() -> None:
    chain = uniform(run_dp.MOST_STAGES + 1, state=1, tape=1)
    assert not takes(chain)
    with pytest.raises(WorkloadError, match="takes chains of up to"):
        RunDp().solve(chain, 100)


def test_long_blocks_of_a_network() -> None:
    chain = Chain.load(INSTANCES / "ode_L8_Nt64.json")
    unit = chain_sizes(chain).common_divisor
    budgets = [310 * unit, 450 * unit, 700 * unit]
    found = RunDp().solve_each(chain, budgets)
    for budget, mine, other in zip(
        budgets, found, ChainDp().solve_each(chain, budgets), strict=True
    ):
        assert isinstance(mine, Solution)
        assert isinstance(other, Solution)
        assert mine.trace.peak_bytes <= budget
        assert other.lower_bound_seconds <= mine.trace.seconds * (1 + 1e-9)
        assert mine.trace.seconds <= other.trace.seconds * 1.003
        assert mine.lower_bound_seconds <= other.trace.seconds
        assert mine.lower_bound_seconds >= 0.98 * mine.trace.seconds


def test_chains_without_runs_are_refused() -> None:
    chain = Chain.from_json(tiny_cases()[0]["chain"])
    assert not takes(chain)
    with pytest.raises(WorkloadError, match="for others use chain_dp"):
        RunDp().solve(chain, 100)


def test_the_message_names_the_least_budget() -> None:
    chain = uniform(30, state=1000, tape=9000)
    with pytest.raises(InfeasibleBudgetError, match="no known memory-persistent") as caught:
        RunDp().solve(chain, 12_000)
    assert caught.value.least_budget_bytes == 13_000
    assert RunDp().solve(chain, 13_000).trace.peak_bytes == 13_000


def test_it_says_how_far_it_is() -> None:
    shares: list[float] = []
    with listening(lambda what, share: shares.append(share)):
        RunDp().solve(uniform(30, state=3, tape=9), 40)
    assert shares
    assert all(0 <= share <= 1 for share in shares)


def test_very_long_runs_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = uniform(300, state=1, tape=3)
    exact = RunDp().solve(chain, 400)
    monkeypatch.setattr(run_dp, "_NUMBERS", 1)
    rounded = RunDp().solve(chain, 600)
    assert rounded.rounding_unit_bytes > 1 == exact.rounding_unit_bytes
    assert rounded.trace.peak_bytes <= 600


@pytest.mark.parametrize("budget", [150_000, 180_000, 250_000])
def test_large_tapes_are_not_put_into_groups(budget: int) -> None:
    # Two of these tapes hardly fit, though they are far from whole slots.
    solution = RunDp().solve(uniform(1000, state=8191, tape=65_537), budget)
    assert solution.rounding_unit_bytes > 1
    assert solution.trace.seconds <= solution.lower_bound_seconds * 1.005
