"""plan() and tradeoff(): budgets, solvers, laws, and messages with figures and remedies."""

import itertools
import math
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings

from ckptsched.base.budget import Budget
from ckptsched.base.errors import (
    BudgetSyntaxError,
    CkptschedError,
    InfeasibleBudgetError,
    SolverRefusalError,
    SolverWarning,
    WorkloadError,
)
from ckptsched.fitting.planning import plan
from ckptsched.planner.plan import Plan
from ckptsched.planner.planner import compare_baselines, plan_each
from ckptsched.planner.tradeoff import Tradeoff, tradeoff
from ckptsched.simulator.simulator import simulate
from ckptsched.solvers import SOLVERS, ChainDp, get_solver
from ckptsched.solvers.chain.solver import Effort
from ckptsched.workload.chain import Chain
from ckptsched.workload.stage import Stage
from tests.support.shared_chains import exact_stage, uniform
from tests.support.small_chains import MIB, mixed_chain, random_chains, uniform_chain

CHAINS = [uniform_chain(), mixed_chain(), uniform_chain(1)]


@pytest.mark.parametrize(
    ("budget", "found"),
    [
        (-1, "-1 bytes is not positive"),
        (0, "0 bytes is not positive"),
        (0.5, "0.5 bytes is less than one byte"),
        (math.nan, "nan bytes is not a finite number"),
        (math.inf, "inf bytes is not a finite number"),
        ("-3 MiB", "'-3 MiB' is not positive"),
        ("0", "'0' is not positive"),
        ("0%", "'0%' is not positive"),
        ("nan", "'nan' cannot be read"),
        ("12 parsecs", "'12 parsecs' has the unknown unit 'parsecs'"),
        ("", "'' cannot be read"),
        (None, "NoneType"),
        (True, "bool"),
    ],
)
def test_bad_budgets(budget: Any, found: str) -> None:
    with pytest.raises(BudgetSyntaxError) as caught:
        plan(mixed_chain(), budget=budget)
    assert found in str(caught.value)
    assert '"512MiB", "1.5 GB" or "40%"' in str(caught.value)


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: f"{chain.name}{len(chain)}")
@pytest.mark.parametrize("solver", ["auto", "chain_dp"])
def test_a_budget_that_is_too_small_names_the_least_that_works(chain: Chain, solver: str) -> None:
    with pytest.raises(InfeasibleBudgetError) as caught:
        plan(chain, budget=1000, solver=solver)
    error = caught.value
    assert error.budget_bytes == 1000
    assert error.least_budget_bytes is not None
    assert f"({error.least_budget_bytes} bytes)" in str(error)
    assert "budget of 1000 B;" in str(error)
    assert error.stage
    assert error.stage in str(error)
    made = plan(chain, budget=error.least_budget_bytes, solver=solver)
    assert made.peak_bytes == made.least_budget_bytes == error.least_budget_bytes
    with pytest.raises(InfeasibleBudgetError):
        plan(chain, budget=error.least_budget_bytes - 1, solver=solver)


def test_a_share_that_is_too_small_says_what_was_asked() -> None:
    with pytest.raises(InfeasibleBudgetError, match=r"^2% of storing everything is too little: "):
        plan(mixed_chain(), budget="2%")


@pytest.mark.parametrize("budget", [1000, "1KiB", "0.1%"])
def test_an_error_says_in_bytes_what_no_plan_can_do_without(budget: Any) -> None:
    first = replace(mixed_chain().stages[0], parameter_gradient_bytes=5 * MIB, name="stem")
    chain = replace(mixed_chain(), stages=(first, *mixed_chain().stages[1:]), held_bytes=3 * MIB)
    with pytest.raises(InfeasibleBudgetError) as caught:
        plan(chain, budget=budget)
    message, least = str(caught.value), caught.value.least_budget_bytes
    everything = plan(chain, budget="100%")
    for size in (everything.store_all_bytes, least, 5 * MIB, 3 * MIB):
        assert f"({size} bytes)" in message
    assert f"the largest stage ({chain.stage_name(1)!r}) " in message
    assert "A budget counts what a step makes: states and tapes, gradients of param" in message
    assert "not parameters, buffers, optimizer and batch" in str(everything)
    made = plan(chain, budget=message.partition("the least budget is ")[2].partition("%")[0] + "%")
    assert made.peak_bytes <= made.budget_bytes


def test_an_empty_chain_cannot_be_made() -> None:
    with pytest.raises(WorkloadError, match="at least one stage, found none"):
        plan(Chain(stages=()), budget=1)


def test_an_unknown_solver_lists_the_names() -> None:
    with pytest.raises(CkptschedError) as caught:
        plan(mixed_chain(), budget="50%", solver="magic")
    message = str(caught.value)
    assert "'magic'" in message
    for name in ("chain_dp", "revolve", "store_all", "anode", "sqrt", "auto"):
        assert name in message


def test_a_chain_takes_no_sample() -> None:
    with pytest.raises(WorkloadError, match="takes no other"):
        plan(mixed_chain(), object(), budget="50%")


@pytest.mark.parametrize(
    ("budget", "size", "text"),
    [
        (40 * MIB, 40 * MIB, "41943040 bytes"),
        (41943040.7, 40 * MIB, "41943040.7 bytes"),
        (" 40 MiB ", 40 * MIB, "40 MiB"),
        (Budget(bytes=40 * MIB), 40 * MIB, "41943040 bytes"),
        (Budget.total("64MiB", 24 * MIB), 40 * MIB, "67108864 bytes less 25165824 reserved"),
    ],
)
def test_budgets_as_people_write_them(budget: Any, size: int, text: str) -> None:
    made = plan(uniform_chain(), budget=budget)
    assert (made.budget_bytes, made.budget_text) == (size, text)


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: f"{chain.name}{len(chain)}")
def test_a_share_is_of_the_simulated_store_all_peak(chain: Chain) -> None:
    store_all = get_solver("store_all").solve(chain, 2**40)
    made = plan(chain, budget="100%")
    assert made.store_all_bytes == made.budget_bytes == store_all.trace.peak_bytes
    assert made.overhead == made.gap == 0
    assert made.forwards == len(chain)
    assert made.budget_text == "100%"


def test_a_share_is_rounded_down() -> None:
    everything = plan(mixed_chain(), budget="100%")
    share = plan(mixed_chain(), budget="66.7%")
    assert share.budget_bytes == everything.store_all_bytes * 667 // 1000


@pytest.mark.parametrize(
    "solver", ["chain_dp", "store_all", "anode", "every_2", "every_stage", "sqrt", "input_only"]
)
def test_every_solver_by_name(solver: str) -> None:
    made = plan(mixed_chain(), budget="100%", solver=solver)
    assert made.solver == solver
    assert made.gap >= 0
    assert simulate(made.chain, made.schedule).peak_bytes <= made.budget_bytes


def test_revolve_by_name() -> None:
    assert plan(uniform_chain(), budget="50%", solver="revolve").solver == "revolve"


def test_a_baseline_claims_only_what_holds_for_all_schedules() -> None:
    made = plan(mixed_chain(), budget="100%", solver="every_stage")
    assert made.schedule_class == "all schedules"
    assert made.lower_bound_seconds == mixed_chain().store_all_seconds
    assert made.gap == made.overhead > 0


@given(chain=random_chains())
@settings(max_examples=60)
def test_auto_is_never_beaten_by_a_baseline(chain: Chain) -> None:
    rules = compare_baselines(chain)
    for rule in rules:
        if rule.peak_bytes:
            made = plan(chain, budget=rule.peak_bytes)
            assert made.seconds <= rule.seconds * (1 + 1e-9)
            assert made.peak_bytes <= rule.peak_bytes
            assert made.lower_bound_seconds <= made.seconds * (1 + 1e-9)


def test_long_chains_are_planned_without_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOLVERS, "chain_dp", partial(ChainDp, effort=Effort(additions=100)))
    made = plan(mixed_chain(), budget="60%")
    assert made.solver != "chain_dp"
    assert made.peak_bytes <= made.budget_bytes
    assert made.schedule_class == "all schedules"
    assert made.gap == made.overhead
    with pytest.raises(InfeasibleBudgetError) as caught:
        plan(mixed_chain(), budget=1)
    assert plan(mixed_chain(), budget=caught.value.least_budget_bytes or 0)


def test_chains_of_long_runs_are_planned_as_such() -> None:
    chain = uniform(600, state=10, tape=40)
    made = plan(chain, budget=1020)
    # Equal states never grow: what no memory-persistent schedule beats, no schedule beats.
    assert (made.solver, made.schedule_class) == ("run_dp", "all pinned schedules")
    assert made.gap < 0.01
    assert made.seconds < plan(chain, budget=1020, solver="revolve").seconds


def test_a_long_uniform_chain_gets_the_best_k(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptsched.planner.solver_choice._names", lambda chain: ["revolve"])
    chain = uniform(600, state=10, tape=40)
    budget = 1020
    every = [get_solver(f"every_{k}").solve(chain, 2**40).trace for k in range(1, 600)]
    best = min(trace.seconds for trace in every if trace.peak_bytes <= budget)
    made = plan(chain, budget=budget)
    assert made.seconds <= best < get_solver("revolve").solve(chain, budget).trace.seconds
    assert made.solver.startswith("every_")
    assert made.schedule_class == "all schedules"
    assert plan(chain, budget=budget, solver="revolve").schedule_class == (
        "binomial (states and one tape)"
    )


def test_a_very_long_uniform_chain_gets_a_good_k_too() -> None:
    made = plan(uniform(21_000, state=10, tape=40), budget=42_000)
    assert made.solver.startswith("every_")
    assert made.seconds < 4 * 21_000


@pytest.mark.parametrize("exact", [False, True])
def test_long_mixed_chains_get_a_k_of_the_grid(
    exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptsched.planner.solver_choice._names", lambda chain: [])
    stage = exact_stage() if exact else uniform(1, state=10, tape=40).stages[0]
    other = replace(stage, forward_seconds=1.5)
    chain = Chain(stages=(*(stage,) * 999, other, *(stage,) * 1000), held_bytes=10 * exact)
    [result] = plan_each(chain, ["20%"])
    assert isinstance(result, Plan)
    fitting = [x.seconds for x in compare_baselines(chain) if x.peak_bytes <= result.budget_bytes]
    assert result.seconds < min(fitting)
    assert result.solver.startswith("every_")


@pytest.mark.parametrize("seed", range(6))
def test_separate_calls_at_growing_budgets_never_get_costlier(seed: int) -> None:
    # Whole numbers of one unit are planned exactly. Where sizes are rounded two separate calls
    # may differ by the rounding, as ChainDp says.
    random = Random(seed)
    stages = []
    for _ in range(6):
        state = random.randint(0, 9)
        stages.append(
            Stage(
                forward_seconds=random.randint(0, 9),
                backward_seconds=random.randint(0, 9),
                state_bytes=state,
                tape_bytes=state + random.randint(0, 12),
                gradient_bytes=random.randint(0, 9),
                forward_overhead_bytes=random.randint(0, 5),
                backward_overhead_bytes=random.randint(0, 5),
            )
        )
    chain = Chain(stages=tuple(stages), input_bytes=3, input_gradient_bytes=3)
    everything = plan(chain, budget="100%")
    before = math.inf
    for budget in range(everything.least_budget_bytes, everything.store_all_bytes + 1):
        seconds = plan(chain, budget=budget).seconds
        assert seconds <= before
        before = seconds
    assert before == chain.store_all_seconds


def test_many_budgets_give_what_one_gives() -> None:
    chain = mixed_chain()
    budgets = ["90%", 1, "50%", 40 * MIB]
    results = plan_each(chain, budgets)
    assert isinstance(results[1], InfeasibleBudgetError)
    for budget, result in zip(budgets, results, strict=True):
        if isinstance(result, Plan):
            alone = plan(chain, budget=budget)
            assert result.budget_bytes == alone.budget_bytes
            assert result.seconds <= alone.seconds


def test_a_solver_that_overruns_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Liar:
        name = "liar"

        def solve_each(self, chain: Chain, budgets: list[int]) -> list[Any]:
            honest = get_solver("store_all").solve(chain, 2**40)
            return [honest for _ in budgets]

    real = get_solver
    monkeypatch.setattr(
        "ckptsched.planner.solver_choice.get_solver",
        lambda name: Liar() if name == "liar" else real(name),
    )
    with pytest.raises(CkptschedError, match="fault of ckptsched"):
        plan(mixed_chain(), budget="50%", solver="liar")


def check_rows(found: Tradeoff) -> None:
    plans = [row.plan for row in found.rows]
    assert [p.budget_bytes for p in plans] == sorted({p.budget_bytes for p in plans})
    for small, large in itertools.pairwise(plans):
        assert large.seconds <= small.seconds
    for row in found.rows:
        assert row.plan.peak_bytes <= row.plan.budget_bytes
        assert row.plan.gap >= 0
        for rule in found.fitting(row):
            assert row.plan.seconds <= rule.seconds * (1 + 1e-9)


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: f"{chain.name}{len(chain)}")
def test_the_trade_off_spans_least_to_store_all(chain: Chain) -> None:
    found = tradeoff(chain)
    check_rows(found)
    first, last = found.rows[0].plan, found.rows[-1].plan
    assert first.budget_bytes == first.least_budget_bytes == first.peak_bytes
    assert last.budget_bytes == last.store_all_bytes
    assert last.overhead == 0
    assert len(found.rows) == (10 if len(chain) > 1 else 1)
    for row in found.rows:
        alone = plan(chain, budget=row.plan.budget_bytes)
        assert row.plan.seconds <= alone.seconds * (1 + 1e-12)


@given(chain=random_chains())
@settings(max_examples=40)
def test_every_trade_off_is_monotone(chain: Chain) -> None:
    if plan(chain, budget=10**6).store_all_bytes:
        check_rows(tradeoff(chain, 5))


@given(chain=random_chains())
@settings(max_examples=40)
def test_the_trade_off_is_the_plan_at_each_of_its_budgets(chain: Chain) -> None:
    # Small whole numbers are planned exactly, so that no budget gains from another's schedule.
    if plan(chain, budget=10**6).store_all_bytes:
        for row in tradeoff(chain, 6).rows:
            alone = plan(chain, budget=row.plan.budget_bytes)
            assert row.plan.seconds == pytest.approx(alone.seconds, rel=1e-12)


def depths(found: Tradeoff) -> list[float]:
    """How far each row lies below the chord, in scaled coordinates."""
    x = [row.plan.budget_bytes for row in found.rows]
    y = [row.plan.seconds for row in found.rows]
    return [
        1 - (a - x[0]) / (x[-1] - x[0]) - (b - y[-1]) / (y[0] - y[-1])
        for a, b in zip(x, y, strict=True)
    ]


@given(chain=random_chains())
@settings(max_examples=40)
def test_the_knee_lies_farthest_below_the_chord(chain: Chain) -> None:
    if not plan(chain, budget=10**6).store_all_bytes:
        return
    found = tradeoff(chain, 7)
    knee = found.knee
    first, last = found.rows[0].plan, found.rows[-1].plan
    if knee is None:
        falls = first.seconds > last.seconds * (1 + 1e-9)
        assert not falls or max(depths(found)) <= 1e-6
    else:
        below = depths(found)[found.rows.index(knee)]
        assert below == pytest.approx(max(depths(found)), abs=1e-6)
        assert below > 0
        assert first.budget_bytes < knee.plan.budget_bytes < last.budget_bytes


def test_the_knee_does_not_depend_on_units() -> None:
    found = tradeoff(mixed_chain(), 9)
    data = mixed_chain().to_json()
    for key in ("u_f", "u_b"):
        data[key] = [1000 * x for x in data[key]]
    data["u_loss"] *= 1000
    slow = tradeoff(Chain.from_json(data), [row.plan.budget_bytes for row in found.rows])
    assert found.knee is not None
    assert slow.knee is not None
    assert found.rows.index(found.knee) == slow.rows.index(slow.knee)


def test_two_rows_have_no_knee() -> None:
    assert tradeoff(mixed_chain(), 2).knee is None
    assert tradeoff(uniform_chain(1)).knee is None


def test_budgets_of_ones_own() -> None:
    found = tradeoff(mixed_chain(), ["80%", "60%"], also=[50 * MIB])
    assert {row.plan.budget_text for row in found.rows} == {"80%", "60%", f"{50 * MIB} bytes"}
    check_rows(found)


@pytest.mark.parametrize("count", [1, 0, -4])
def test_too_few_budgets(count: int) -> None:
    with pytest.raises(BudgetSyntaxError, match=f"at least 2 budgets, found {count}"):
        tradeoff(mixed_chain(), count)


def test_no_budgets() -> None:
    with pytest.raises(BudgetSyntaxError, match="at least one budget, found none"):
        tradeoff(mixed_chain(), [])


def test_an_infeasible_row_is_an_error() -> None:
    with pytest.raises(InfeasibleBudgetError, match="the least that works is"):
        tradeoff(mixed_chain(), ["100%", 5])


def test_a_larger_budget_takes_over_what_a_smaller_one_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chain = mixed_chain()
    good = get_solver("chain_dp").solve(chain, 60 * MIB)
    bad = get_solver("every_stage").solve(chain, 2**40)

    class Odd:
        name = "odd"

        def solve_each(self, chain: Chain, budgets: list[int]) -> list[Any]:
            return [replace(good if size == 60 * MIB else bad) for size in budgets]

    real = get_solver
    monkeypatch.setattr(
        "ckptsched.planner.solver_choice.get_solver",
        lambda name: Odd() if name == "odd" else real(name),
    )
    plans = plan_each(chain, [100 * MIB, 60 * MIB], solver="odd")
    assert [isinstance(x, Plan) and x.schedule == good.schedule for x in plans] == [True, True]


@pytest.mark.parametrize("fault", [ValueError("odd"), MemoryError(), WorkloadError("negative")])
def test_auto_says_which_solver_failed(fault: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = mixed_chain()
    right = plan(chain, budget="60%", cache=False)

    def fails(*_: object) -> None:
        raise fault

    monkeypatch.setattr("ckptsched.solvers.chain.solver.ChainDp.solve_each", fails)
    with pytest.warns(SolverWarning, match=rf"chain_dp failed.*{type(fault).__name__}"):
        found = plan(chain, budget="60%", cache=False)
    assert found.peak_bytes <= found.budget_bytes
    assert found.seconds >= right.seconds
    with pytest.raises(type(fault)):  # asked for by name there is no other
        plan(chain, budget="60%", solver="chain_dp", cache=False)


def test_a_refusal_is_no_fault() -> None:
    assert issubclass(SolverRefusalError, WorkloadError)
    with pytest.raises(SolverRefusalError, match="revolve needs stages of equal"):
        plan(mixed_chain(), budget="60%", solver="revolve", cache=False)
    plan(mixed_chain(), budget="60%", cache=False)  # no warning
