"""The dynamic program in exact bytes: equal to enumeration, bounds that hold, plans that fit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsched.ode import ODEBlock
from ckptsched.profiler.profile import profile
from ckptsched.solvers import ChainDp, Solution
from ckptsched.solvers.chain.sizes import chain_sizes
from ckptsched.solvers.chain.tables import Table
from ckptsched.workload.chain import Chain
from tests.oracles.brute_force import (
    cheapest_of,
    persistent_frontier,
)
from tests.solvers.chain.answers import check_result, seconds_of
from tests.support.strategies import (
    ledger_chains,
)


@settings(max_examples=100, deadline=None)
@given(ledger_chains(views=False))
def test_equal_to_enumeration_in_exact_bytes(chain: Chain) -> None:
    frontier = persistent_frontier(chain)
    budgets = sorted({peak + d for peak, _ in frontier for d in (-1, 0)})
    for budget, result in zip(budgets, ChainDp().solve_each(chain, budgets), strict=True):
        check_result(chain, budget, result)
        assert seconds_of(result) == cheapest_of(frontier, budget)
        if isinstance(result, Solution):
            assert result.lower_bound_seconds == result.trace.seconds


@settings(max_examples=60, deadline=None)
@given(ledger_chains(), st.booleans())
def test_exact_bytes_bound_and_fit(chain: Chain, noise: bool) -> None:
    check_exact_bytes(replace(chain, random_state_bytes=5) if noise else chain)


@settings(max_examples=40, deadline=None)
@given(ledger_chains(noise=True))
def test_exact_bytes_with_buffers_and_random_states(chain: Chain) -> None:
    check_exact_bytes(chain)


def check_exact_bytes(chain: Chain) -> None:
    frontier = persistent_frontier(chain)
    sizes = chain_sizes(chain)
    table = Table(sizes, 1, max(0, frontier[-1][0] - sizes.fixed), exact=True)
    budgets = [peak for peak, _ in frontier]
    for (budget, optimum), result in zip(
        frontier, ChainDp().solve_each(chain, budgets), strict=True
    ):
        bound = table.extra_seconds(budget - sizes.fixed) + chain.store_all_seconds
        assert bound <= optimum
        check_result(chain, budget, result)
        if isinstance(result, Solution):
            assert result.lower_bound_seconds <= optimum
            ChainDp().solve(chain, result.least_budget_bytes)


def least_with(chain: Chain, times: Sequence[tuple[float, float]]) -> int:
    """The least budget where stages take these seconds, in turn, forward and backward."""
    stages = tuple(
        replace(stage, forward_seconds=forward, backward_seconds=backward)
        for stage, (forward, backward) in zip(chain.stages, itertools.cycle(times), strict=False)
    )
    [found] = ChainDp().solve_each(replace(chain, stages=stages), [2**50])
    assert isinstance(found, Solution)
    return found.least_budget_bytes


SOME_SECONDS = st.tuples(st.floats(1e-6, 1e-3), st.floats(1e-6, 1e-3))


@settings(max_examples=60, deadline=None)
@given(
    ledger_chains(most_stages=9, noise=True),
    *[st.lists(SOME_SECONDS, min_size=1, max_size=4)] * 2,
)
def test_the_least_budget_depends_on_bytes_alone(
    chain: Chain, times: list[tuple[float, float]], again: list[tuple[float, float]]
) -> None:
    """What is named after one measurement is met after the next, which gives other seconds."""
    assert least_with(chain, times) == least_with(chain, again)


def test_the_least_budget_of_a_rotation_depends_on_bytes_alone() -> None:
    """Its relaxed ledger promises less than there is, so that the least must be looked for."""

    class Turn(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = torch.nn.Parameter(torch.ones(2, dtype=torch.complex128))

        def forward(self, y: torch.Tensor) -> torch.Tensor:
            return self.rate * y

    def loss(y: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(y).square().mean()

    y0 = torch.ones(2, dtype=torch.complex128, requires_grad=True)
    chain = profile(ODEBlock(Turn(), steps=50, method="rk4"), y0, loss=loss)
    times = np.random.default_rng(0).uniform((3e-5, 9e-5), (5e-5, 1.5e-4), (60, 2))
    assert len({least_with(chain, [(forward, backward)]) for forward, backward in times}) == 1
