"""The search over all pinned schedules: equal to brute force, and honest where it gives up."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ckptsched.errors import InfeasibleBudgetError, WorkloadError
from ckptsched.simulator import simulate
from ckptsched.solvers import ChainDp, ExactSearch, get_solver
from ckptsched.solvers.exact_search import ALL, ALL_PINNED, certify_all
from ckptsched.solvers.pinned_bound import least_pinned_bytes
from ckptsched.solvers.pinned_least import LeastSearch
from ckptsched.solvers.pinned_sizes import are_runs_fastest, pinned_sizes
from ckptsched.workload import Chain

from .brute_force import cheapest
from .pinned_oracle import cheapest_pinned, least_budget
from .strategies import chains, chains_with_options, ledger_chains, scaled_chains

TINY = json.loads((Path(__file__).parent / "data" / "tiny.json").read_text())["cases"]
E1 = {"u_f": [1, 1], "u_b": [2, 2], "w_a": [1, 1, 1], "w_t": [3, 3]}
E2 = {
    "u_f": [1, 2, 1],
    "u_b": [2, 4, 2],
    "w_a": [2, 1, 1, 1],
    "w_t": [2, 4, 2],
    "o_b": [0, 1, 0],
}
E3 = {"u_f": [3, 7, 6], "u_b": [4, 2, 2], "w_a": [1, 1, 1, 1], "w_t": [2, 2, 2]}
E4 = {
    "u_f": [10, 4, 4, 8],
    "u_b": [6, 16, 11, 9],
    "w_a": [1, 1, 5, 5, 2],
    "w_t": [8, 12, 8, 8],
}
E5 = {
    "u_f": [1, 2, 4],
    "u_b": [1, 2, 4],
    "w_a": [1, 2, 2, 1],
    "w_t": [3, 3, 3],
    "o_f": [0, 2, 0],
}
E5B = {**E5, "o_b": [0, 0, 3]}
EXAMPLES = [
    (E1, {6: None, 7: 7, 8: 7, 9: 6}),
    (E2, {9: None, 10: 15, 11: 13, 12: 12}),
    (E3, {5: None, 6: 37, 7: 34, 8: 27, 9: 24}),
    (E4, {23: None, 24: 100, 25: 90, 27: 86, 29: 82, 32: 80, 34: 76, 37: 72, 44: 68}),
    (E5, {9: None, 10: 18, 11: 17, 12: 15, 13: 14}),
    (E5B, {11: None, 12: 17, 13: 17, 15: 15, 16: 14}),
]


@pytest.mark.parametrize(
    ("data", "budget", "optimum"),
    [(data, *row) for data, rows in EXAMPLES for row in rows.items()],
)
def test_worked_examples(data: dict[str, list[int]], budget: int, optimum: float | None) -> None:
    chain = Chain.from_json(data)
    if optimum is None:
        with pytest.raises(InfeasibleBudgetError) as caught:
            ExactSearch().solve(chain, budget)
        assert caught.value.least_budget_bytes == budget + 1
        return
    solution = get_solver("exact_search").solve(chain, budget)
    assert solution.trace.seconds == optimum
    assert solution.lower_bound_seconds == pytest.approx(optimum)
    assert solution.trace.peak_bytes <= budget


@pytest.mark.parametrize("case", TINY)
def test_equals_the_pinned_optimum_of_every_tiny_chain(case: dict[str, object]) -> None:
    chain = Chain.from_json(case["chain"])  # type: ignore[arg-type]
    for budget, _, optimum, _ in case["optimum"]:  # type: ignore[attr-defined]
        found = certify_all(chain, budget)
        assert found.is_closed
        if optimum is None:
            assert found.schedule is None
            assert math.isinf(found.lower_bound_seconds)
        else:
            assert found.schedule is not None
            trace = simulate(chain, found.schedule)
            assert (trace.seconds, found.lower_bound_seconds) == (optimum, optimum)
            assert trace.peak_bytes <= budget


@given(chains(4, extras=False), st.integers(0, 60))
@settings(max_examples=120, deadline=None)
def test_equals_brute_force_where_gradients_are_of_their_states_size(
    chain: Chain, budget: int
) -> None:
    """There a state never pays beside its tape, which `cheapest` takes for granted."""
    found = certify_all(chain, budget)
    assert found.lower_bound_seconds == cheapest(chain, budget)
    assert found.is_closed


@given(chains(3), st.integers(0, 60))
@settings(max_examples=150, deadline=None)
def test_equals_brute_force_over_everything_that_is_pinned(chain: Chain, budget: int) -> None:
    optimum = cheapest_pinned(chain, budget)
    (solution,) = ExactSearch().solve_each(chain, [budget])
    assert solution.least_budget_bytes == least_budget(chain)
    if isinstance(solution, InfeasibleBudgetError):
        assert math.isinf(optimum)
        return
    assert solution.trace.seconds == optimum
    assert solution.lower_bound_seconds == pytest.approx(optimum)
    assert solution.trace.peak_bytes <= budget
    assert solution.schedule_class in (ALL, ALL_PINNED)


@given(chains_with_options(3, 1), st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_several_tapes_a_stage(chain: Chain, budget: int) -> None:
    optimum = cheapest_pinned(chain, budget)
    found = certify_all(chain, budget)
    if are_runs_fastest(pinned_sizes(chain)):
        assert found.lower_bound_seconds == pytest.approx(optimum)
        if found.schedule is not None:
            trace = simulate(chain, found.schedule)
            assert trace.seconds == optimum
            assert trace.peak_bytes <= budget
    else:
        assert found.lower_bound_seconds <= optimum
        with pytest.raises(WorkloadError, match="none of which may be made in less"):
            ExactSearch().solve(chain, budget)


def test_a_tape_is_made_beside_the_state_that_the_next_tape_keeps() -> None:
    """Where a gradient is larger than its state and the next tape, that may pay."""
    chain = Chain.from_json(
        {
            "u_f": [1, 1, 1],
            "u_b": [0, 0, 0],
            "w_a": [0, 0, 0, 0],
            "w_t": [1, 0, 0],
            "w_g": [0, 4, 0, 3],
            "o_f": [6, 0, 0],
            "o_loss": 5,
        }
    )
    assert cheapest(chain, 8) == 5
    assert ExactSearch().solve(chain, 8).trace.seconds == 4 == cheapest_pinned(chain, 8)


@given(scaled_chains(4), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_sizes_that_share_no_unit(chain: Chain, share: float) -> None:
    least = ChainDp().solve(chain, 10**9).least_budget_bytes
    budget = int(least * (1 + share))
    solution = ExactSearch().solve(chain, budget)
    assert solution.trace.seconds == cheapest_pinned(chain, budget)


@given(chains(4), st.integers(10, 60), st.integers(20, 60))
@settings(max_examples=60, deadline=None)
def test_where_it_gives_up_its_bound_holds(chain: Chain, budget: int, most: int) -> None:
    optimum = cheapest_pinned(chain, budget)
    found = certify_all(chain, budget, most_positions=most)
    assert found.lower_bound_seconds <= optimum
    assert found.lower_bound_seconds >= chain.store_all_seconds
    if found.is_closed:
        assert found.lower_bound_seconds == optimum


@given(chains(4), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_what_is_known_to_be_best_is_confirmed(chain: Chain, budget: int) -> None:
    optimum = cheapest_pinned(chain, budget)
    assume(math.isfinite(optimum))
    found = certify_all(chain, budget, optimum)
    assert found.is_closed
    assert found.schedule is None
    assert found.lower_bound_seconds == optimum


@given(ledger_chains(4), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_with_a_ledger_it_keeps_the_budget_and_claims_no_more_than_it_knows(
    chain: Chain, share: float
) -> None:
    least = ChainDp().solve(chain, 10**6).least_budget_bytes
    budget = int(least * (1 + share))
    solution = ExactSearch().solve(chain, budget)
    persistent = ChainDp().solve(chain, budget)
    assert solution.trace.peak_bytes <= budget
    assert solution.trace.seconds <= persistent.trace.seconds
    assert solution.schedule_class == ALL
    assert solution.lower_bound_seconds <= chain.store_all_seconds


@given(chains(4), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_the_search_for_the_least_budget_says_what_works(chain: Chain, most: int) -> None:
    sizes, least = pinned_sizes(chain), least_budget(chain)
    known = ChainDp().solve(chain, 10**9).least_budget_bytes
    assert LeastSearch(sizes, least_pinned_bytes(sizes), known, 10**6).run() == least
    assert least <= LeastSearch(sizes, least_pinned_bytes(sizes), known, most).run() <= known


def test_long_chains_are_refused() -> None:
    chain = Chain.from_json(E1)
    long = replace(chain, stages=chain.stages * 15)
    with pytest.raises(WorkloadError, match=r"28 stages at most, .*; found 30"):
        ExactSearch().solve(long, 100)


def test_a_search_needs_a_position() -> None:
    with pytest.raises(WorkloadError, match="at least one position, found 0"):
        ExactSearch(most_positions=0)
