"""Long periodic chains: schedules of the class keep their budget, and are near the best."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ckptsched as cs
from ckptsched.base.errors import InfeasibleBudgetError, WorkloadError
from ckptsched.ode import ODEBlock
from ckptsched.simulator.simulator import simulate
from ckptsched.solvers import ChainDp, Periodic
from ckptsched.solvers.binomial.periodic import find_periods
from ckptsched.workload.chain import Chain
from tests.support.shared_chains import uniform
from tests.support.strategies import stages


@st.composite
def periodic_chains(draw: st.DrawFn, most_units: int = 12) -> Chain:
    period = draw(st.lists(stages(extras=False), min_size=2, max_size=4))
    units = draw(st.integers(4, most_units))
    return Chain(stages=tuple(period) * units, input_gradient_bytes=draw(st.integers(0, 5)))


def least_of(solver: Periodic | ChainDp, chain: Chain) -> int:
    [found] = solver.solve_each(chain, [-1])
    assert isinstance(found, InfeasibleBudgetError)
    return found.least_budget_bytes or 0


@settings(deadline=None, max_examples=40)
@given(periodic_chains(), st.floats(0, 1.2))
def test_schedules_keep_the_budget_and_are_no_better_than_the_best(
    chain: Chain, share: float
) -> None:
    assert find_periods(chain) is not None
    least = least_of(Periodic(), chain)
    everything = cs.plan(chain, budget=2**50, solver="store_all", cache=False).peak_bytes
    budget = max(least, int(share * everything))
    found = Periodic().solve(chain, budget)
    trace = simulate(chain, found.schedule)
    assert trace.peak_bytes == found.trace.peak_bytes <= budget
    assert found.least_budget_bytes == least
    assert chain.store_all_seconds * (1 - 1e-9) <= found.lower_bound_seconds
    assert found.lower_bound_seconds <= trace.seconds * (1 + 1e-9)
    with pytest.raises(InfeasibleBudgetError):
        Periodic().solve(chain, least - 1)


@given(periodic_chains(), st.integers(0, 3))
def test_the_period_is_the_shortest_that_repeats_but_at_the_ends(chain: Chain, ends: int) -> None:
    other = replace(chain.stages[0], forward_seconds=1e9)
    changed = [*chain.stages]
    if ends & 1:
        changed[0] = other
    if ends & 2:
        changed[-1] = other
    found = find_periods(replace(chain, stages=tuple(changed)))
    if found is None:
        return
    n, period = len(chain), found.longest
    assert found.lasts[0] == 0
    assert found.lasts[-1] == n
    sizes = [b - a for a, b in zip(found.lasts, found.lasts[1:], strict=False)]
    assert sizes[0] == period
    assert set(sizes[1:]) == {period - n % sizes[-1]}
    stages = changed[found.lasts[1] : found.lasts[-2]]
    assert stages[sizes[-1] :] == stages[: -sizes[-1]]


def slopes(method: str, steps: int) -> Chain:
    torch.manual_seed(0)
    f = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16)).double()
    x = torch.randn(32, 16, dtype=torch.float64, requires_grad=True)
    return cs.profile(ODEBlock(f, method, steps, granularity="slope"), x)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_slopes_are_planned_nearly_as_well_as_by_the_table(method: str) -> None:
    chain = slopes(method, 16)
    periods = find_periods(chain)
    assert periods is not None
    assert periods.units == 16
    least = least_of(ChainDp(), chain)
    assert least_of(Periodic(), chain) <= 1.02 * least
    for factor in (1.3, 2.0, 8.0):
        budget = int(factor * least)
        best, found = (solver.solve(chain, budget).trace for solver in (ChainDp(), Periodic()))
        assert found.peak_bytes <= budget
        assert found.forwards <= 1.25 * best.forwards


def test_auto_plans_thousands_of_slopes_near_the_least_of_a_few() -> None:
    few, chain = slopes("rk4", 20), slopes("rk4", 450)
    least = cs.plan(few, budget="100%", cache=False).least_budget_bytes
    plan = cs.plan(chain, budget=2 * least, cache=False)
    assert plan.solver == "periodic"
    assert plan.peak_bytes <= 2 * least
    assert plan.trace.forwards <= 4 * len(chain)
    with pytest.raises(InfeasibleBudgetError) as caught:
        cs.plan(chain, budget=1, cache=False)
    assert caught.value.least_budget_bytes is not None
    assert caught.value.least_budget_bytes <= 1.1 * least


def test_chains_without_a_period_are_refused() -> None:
    assert find_periods(uniform(12, state=1, tape=2)) is not None
    stage = uniform(2, state=1, tape=2).stages[0]
    rising = tuple(replace(stage, forward_seconds=float(k)) for k in range(1, 13))
    chain = Chain(stages=rising)
    assert find_periods(chain) is None
    with pytest.raises(WorkloadError, match="repeat after at most 64"):
        Periodic().solve(chain, 100)
