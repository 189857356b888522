"""Chains with runs of equal stages: plans against the full recurrence, and the lower bound."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ckptsched.errors import InfeasibleBudgetError
from ckptsched.simulator import simulate
from ckptsched.solvers import ChainDp, RunDp
from ckptsched.solvers.run_dp import takes
from ckptsched.workload import Chain
from tests.strategies import stages


@st.composite
def run_chains(draw: st.DrawFn, shortest: int = 4, longest: int = 7) -> Chain:
    """A few different stages, each several times in a row."""
    links = []
    for stage in draw(st.lists(stages(), min_size=1, max_size=3)):
        if draw(st.booleans()):
            stage = replace(stage, parameter_gradient_bytes=0)
        count = draw(st.integers(shortest, longest))
        links += [replace(stage, parameter_gradient_bytes=0)] * (count - 1) + [stage]
    size = draw(st.integers(0, 6))
    chain = Chain(
        stages=tuple(links),
        input_bytes=size,
        input_gradient_bytes=draw(st.integers(0, 6)),
        loss_seconds=draw(st.integers(0, 9).map(float)),
        loss_overhead_bytes=draw(st.integers(0, 6)),
        held_bytes=draw(st.integers(0, 6)),
    )
    assume(takes(chain))
    return chain


def budgets_of(chain: Chain, number: int) -> list[int]:
    """Budgets from below the least of all to what storing everything takes."""
    top = simulate(chain, RunDp().solve(chain, 10**9).schedule).peak_bytes
    return sorted({max(1, round(top * k / number)) for k in range(1, number + 1)})


@settings(max_examples=30, deadline=None)
@given(run_chains())
def test_short_runs_are_planned_as_the_full_recurrence_does(chain: Chain) -> None:
    budgets = budgets_of(chain, 12)
    for budget, found, best in zip(
        budgets,
        RunDp().solve_each(chain, budgets),
        ChainDp().solve_each(chain, budgets),
        strict=True,
    ):
        if isinstance(best, InfeasibleBudgetError):
            assert isinstance(found, InfeasibleBudgetError)
            assert found.least_budget_bytes == best.least_budget_bytes
        else:
            assert not isinstance(found, InfeasibleBudgetError)
            assert simulate(chain, found.schedule).peak_bytes <= budget
            assert found.trace.seconds == pytest.approx(best.trace.seconds, rel=1e-6)
            assert found.lower_bound_seconds <= best.trace.seconds * (1 + 1e-9)
            assert found.least_budget_bytes == best.least_budget_bytes
