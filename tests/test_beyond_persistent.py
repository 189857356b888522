"""Sliding checkpoints: between the optimum of all pinned schedules and the persistent one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsched.errors import InfeasibleBudgetError
from ckptsched.simulator import simulate
from ckptsched.solvers import BeyondPersistent, ChainDp, Solution, get_solver
from ckptsched.solvers.pinned_sizes import pinned_sizes
from ckptsched.solvers.sliding_lowering import Lowering
from ckptsched.solvers.sliding_table import SlidingTable
from ckptsched.workload import Chain

from .brute_force import cheapest_of, persistent_frontier
from .pinned_oracle import cheapest_pinned
from .strategies import chains, chains_with_options, ledger_chains, scaled_chains

E4 = {
    "u_f": [10, 4, 4, 8],
    "u_b": [6, 16, 11, 9],
    "w_a": [1, 1, 5, 5, 2],
    "w_t": [8, 12, 8, 8],
}


def test_a_small_checkpoint_slides_to_a_large_one() -> None:
    chain = Chain.from_json(E4)
    solution = get_solver("beyond_persistent").solve(chain, 24)
    assert ChainDp().solve(chain, 24).trace.seconds == 110
    assert solution.trace.seconds == 100 == cheapest_pinned(chain, 24)
    words = solution.schedule.to_text().split()
    assert words.index("-x1") < words.index("B3"), "x1 goes before Backward(2) consumes it"


@given(
    st.one_of(chains(4), chains_with_options(3)),
    st.lists(st.integers(0, 60), min_size=1, max_size=4),
)
@settings(max_examples=120, deadline=None)
def test_between_the_optimum_and_the_persistent_optimum(chain: Chain, budgets: list[int]) -> None:
    frontier = persistent_frontier(chain)
    for budget, result in zip(budgets, BeyondPersistent().solve_each(chain, budgets), strict=True):
        optimum, persistent = cheapest_pinned(chain, budget), cheapest_of(frontier, budget)
        if isinstance(result, InfeasibleBudgetError):
            assert persistent == np.inf
            continue
        assert optimum <= result.trace.seconds <= persistent
        assert result.trace.peak_bytes <= budget
        assert chain.store_all_seconds <= result.lower_bound_seconds <= optimum


@given(st.one_of(chains(4), chains_with_options(3)))
@settings(max_examples=60, deadline=None)
def test_its_schedules_cost_and_take_what_the_table_says(chain: Chain) -> None:
    sizes = pinned_sizes(chain)
    table = SlidingTable(sizes, 80)
    extra = table.extra_seconds
    for m in np.flatnonzero(np.isfinite(extra)):
        trace = simulate(chain, Lowering(table).run(int(m)))
        assert trace.seconds == chain.store_all_seconds + extra[m]
        assert trace.peak_bytes <= m + sizes.fixed


@given(chains(5), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_longer_segments_may_only_help(chain: Chain, longest: int) -> None:
    sizes = pinned_sizes(chain)
    some = SlidingTable(sizes, 60, longest=longest)
    every = SlidingTable(sizes, 60)
    assert (every.extra_seconds <= some.extra_seconds).all()
    for m in np.flatnonzero(np.isfinite(some.extra_seconds)):
        trace = simulate(chain, Lowering(some).run(int(m)))
        assert trace.seconds == chain.store_all_seconds + some.extra_seconds[m]


@given(st.one_of(scaled_chains(5), ledger_chains(4)), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_rounded_sizes_and_ledgers_keep_the_budget(chain: Chain, share: float) -> None:
    least = ChainDp().solve(chain, 10**9).least_budget_bytes
    budget = int(least * (1 + share))
    solution = BeyondPersistent().solve(chain, budget)
    assert solution.trace.peak_bytes <= budget
    assert solution.trace.seconds <= ChainDp().solve(chain, budget).trace.seconds
    assert solution.lower_bound_seconds <= solution.trace.seconds


def test_it_finds_most_of_what_persistence_loses() -> None:
    """On random growing chains of five stages, over many budgets."""
    draw = np.random.default_rng(0)
    lost = left = 0.0
    for _ in range(60):
        states = np.sort(draw.integers(0, 7, 6))
        chain = Chain.from_json(
            {
                "u_f": draw.integers(0, 10, 5).tolist(),
                "u_b": [0] * 5,
                "w_a": states.tolist(),
                "w_t": (states[1:] + draw.integers(0, 7, 5)).tolist(),
            }
        )
        budgets = list(range(10, 40))
        persistent = ChainDp().solve_each(chain, budgets)
        sliding = BeyondPersistent().solve_each(chain, budgets)
        for budget, before, after in zip(budgets, persistent, sliding, strict=True):
            if isinstance(before, Solution) and isinstance(after, Solution):
                bound = after.lower_bound_seconds
                if before.trace.seconds > bound * (1 + 1e-9):  # else it is optimal
                    optimum = cheapest_pinned(chain, budget)
                    lost += before.trace.seconds - optimum
                    left += after.trace.seconds - optimum
    assert lost > 0
    assert left <= 0.1 * lost


def test_larger_budgets_are_no_costlier_on_a_longer_chain() -> None:
    draw = np.random.default_rng(1)
    states = np.sort(draw.integers(1, 60, 25))
    chain = Chain.from_json(
        {
            "u_f": draw.uniform(1, 10, 24).tolist(),
            "u_b": draw.uniform(1, 10, 24).tolist(),
            "w_a": [0, *states[1:].tolist()],
            "w_t": (states[1:] * draw.integers(1, 6, 24)).tolist(),
        }
    )
    least = ChainDp().solve(chain, 10**6).least_budget_bytes
    results = BeyondPersistent().solve_each(chain, [least + 20 * k for k in range(6)])
    solutions = [result for result in results if isinstance(result, Solution)]
    assert len(solutions) == len(results)
    assert all(a.trace.seconds >= b.trace.seconds for a, b in pairwise(solutions))
    assert all(a.lower_bound_seconds <= a.trace.seconds for a in solutions)


def test_a_budget_below_the_least_is_refused() -> None:
    with pytest.raises(InfeasibleBudgetError, match="the least that works is"):
        BeyondPersistent().solve(Chain.from_json(E4), 10)
