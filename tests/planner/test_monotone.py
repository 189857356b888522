"""More budget never gives a slower plan: separate calls, all solvers of "auto", all instances."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsched.base.errors import InfeasibleBudgetError, WorkloadError
from ckptsched.fitting.largest_that_fits import largest_batch, largest_steps, least_budget
from ckptsched.planner.plan import Plan
from ckptsched.planner.planner import plan_each
from ckptsched.planner.tradeoff import tradeoff
from ckptsched.solvers import ChainDp, RunDp
from ckptsched.solvers.base import AbstractSolver
from ckptsched.workload.chain import Chain
from ckptsched.workload.stage import Block
from tests.support.shared_chains import WITHOUT_SEARCH, instance, uniform
from tests.support.strategies import (
    chains,
    chains_with_options,
    ledger_chains,
    scaled_chains,
    uniform_chains,
)

# Sums of the same seconds in another order differ in their last digits.
DIGITS = 1 + 1e-12
SOLVERS = ("auto", "chain_dp", "run_dp", "revolve", "periodic", "sqrt", "every_stage", "anode")


def seconds_alone(chain: Chain, budget: int, solver: str = "auto") -> float:
    """Seconds of a plan that is made by itself; infinite where there is none."""
    [found] = plan_each(chain, [budget], solver=solver, cache=False)
    return found.seconds if isinstance(found, Plan) else math.inf


def check_falling(pairs: Iterable[tuple[int, float]]) -> None:
    """Seconds never rise with budgets."""
    for (small, before), (large, after) in itertools.pairwise(sorted(pairs)):
        assert after <= before * DIGITS, f"{before} s in {small} bytes, {after} s in {large}"


def between(chain: Chain, shares: Iterable[float]) -> list[int]:
    """Budgets from the least that works to what storing everything takes."""
    [most] = plan_each(chain, [2**50], cache=False)
    assert isinstance(most, Plan)
    low, high = most.least_budget_bytes, most.store_all_bytes
    return sorted({max(1, low + int(share * (high - low))) for share in shares})


def check_solver(solver: AbstractSolver, chain: Chain, shares: Iterable[float]) -> None:
    budgets = between(chain, shares)
    found = [(x, result) for x in budgets for result in solver.solve_each(chain, [x])]
    check_falling(
        (x, math.inf if isinstance(result, InfeasibleBudgetError) else result.trace.seconds)
        for x, result in found
    )


SHARES = st.lists(st.floats(0, 1), min_size=2, max_size=4)


@pytest.mark.parametrize(
    ("small", "large"), [(139_543_448, 140_127_312), (134_288_674, 134_872_537)]
)
def test_snapshots_that_take_a_little_more_cost_a_little_more(small: int, large: int) -> None:
    # What nearly fits the sizes of the recurrence does not fit the ledger by a few snapshots.
    chain = instance("resnet50_ops")
    before, after = seconds_alone(chain, small), seconds_alone(chain, large)
    assert after <= before * DIGITS
    assert before < chain.store_all_seconds * 1.32


@pytest.mark.parametrize(
    "name",
    [
        *("resnet50_b32", "resnet50_ops", "random_n20_s0", "random_n50_s0", "random_n100_s0"),
        *("ode_L8_Nt16", "ode_L8_Nt64"),
        pytest.param("random_n200_s0", marks=pytest.mark.slow),
        pytest.param("random_n500_s0", marks=pytest.mark.slow),
        pytest.param("gpt96", marks=pytest.mark.slow),
    ],
)
def test_instances(name: str) -> None:
    chain = instance(name)
    random = np.random.default_rng(len(chain))
    shares = random.uniform(size=3) ** 2
    near = [share + step for share in shares[:2] for step in (1e-3, 1e-2)]
    budgets = between(chain, [*shares, *(min(share, 1.0) for share in near)])
    check_falling((budget, seconds_alone(chain, budget)) for budget in budgets)


@settings(max_examples=40, deadline=None)
@given(
    chains(most_stages=7)
    | chains_with_options()
    | scaled_chains(most_stages=8)
    | ledger_chains(most_stages=6, noise=True)
    | uniform_chains(),
    SHARES,
    st.sampled_from(SOLVERS),
)
def test_any_chain(chain: Chain, shares: list[float], solver: str) -> None:
    budgets = between(chain, shares)
    try:
        check_falling((budget, seconds_alone(chain, budget, solver)) for budget in budgets)
    except WorkloadError:
        assert solver not in ("auto", "chain_dp")  # it does not take such chains


@settings(max_examples=60, deadline=None)
@given(
    scaled_chains(most_stages=12) | ledger_chains(most_stages=8),
    st.integers(4, 80),
    SHARES,
    st.booleans(),
)
def test_rounded_sizes(chain: Chain, slots: int, shares: list[float], nearest: bool) -> None:
    # Without the search in exact bytes, the levels of the table alone see to it.
    effort = replace(WITHOUT_SEARCH, nearest=nearest)
    check_solver(ChainDp(slots=slots, effort=effort), chain, shares)


@settings(max_examples=30, deadline=None)
@given(scaled_chains(most_stages=12), st.floats(1e3, 1e5), SHARES)
def test_several_tables(chain: Chain, numbers: float, shares: list[float]) -> None:
    effort = replace(WITHOUT_SEARCH, numbers=numbers)
    try:
        check_solver(ChainDp(effort=effort), chain, shares)
    except WorkloadError as error:
        assert "slots, more than" in str(error)  # noqa: PT017 - others pass


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_runs_of_rounded_sizes(data: st.DataObject) -> None:
    size = st.integers(10_000, 99_999)
    blocks, first = [], 1
    stages = []
    for _ in range(data.draw(st.integers(1, 3))):
        state = data.draw(size)
        one = uniform(1, state=state, tape=state + 3 * data.draw(size)).stages[0]
        count = data.draw(st.integers(20, 60))
        blocks.append(Block(name=f"block{first}", first=first, last=first + count - 1))
        stages += [one] * count
        first += count
    chain = Chain(stages=tuple(stages), blocks=tuple(blocks))
    shares = data.draw(SHARES)
    near = [min(1.0, share + data.draw(st.floats(0, 0.02))) for share in shares]
    check_solver(RunDp(), chain, [*shares, *near])


@settings(max_examples=20, deadline=None)
@given(chains(most_stages=6) | ledger_chains(most_stages=5), st.lists(st.floats(0, 1), min_size=2))
def test_more_time_never_needs_more_bytes(chain: Chain, overheads: list[float]) -> None:
    found = [(share, least_budget(chain, overhead=share, cache=False)) for share in overheads]
    for (_, less), (_, more) in itertools.pairwise(sorted(found, key=lambda x: x[0])):
        assert more.budget_bytes <= less.budget_bytes


@settings(max_examples=20, deadline=None)
@given(chains(most_stages=6) | scaled_chains(), st.integers(2, 6))
def test_rows_of_a_trade_off_and_plans_alone(chain: Chain, count: int) -> None:
    if not plan_each(chain, ["100%"])[0].least_budget_bytes:
        return
    rows = [row.plan for row in tradeoff(chain, count, cache=False).rows]
    check_falling((row.budget_bytes, row.seconds) for row in rows)
    for row in rows:
        assert row.seconds <= seconds_alone(chain, row.budget_bytes) * DIGITS


@pytest.mark.parametrize("overhead", [None, 0.3])
def test_more_budget_never_fits_less(overhead: float | None) -> None:
    block = Block(name="ode", first=1, last=12)
    chain = replace(uniform(12, state=10, tape=40, blocks=(block,)), name="steps")
    for find in (largest_batch, largest_steps):
        sizes = [
            find(chain, budget=budget, overhead=overhead, most=200).size
            for budget in (600, 700, 900, 1000, 1500)
        ]
        assert sizes == sorted(sizes)
