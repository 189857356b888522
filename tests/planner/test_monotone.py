"""More budget gives no slower plan; planned by itself, none that is slower by more than its gap."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsched.planner.plan import Plan
from ckptsched.planner.planner import plan_each
from ckptsched.workload.chain import Chain
from tests.support.shared_chains import instance
from tests.support.strategies import (
    chains_with_options,
    ledger_chains,
    parted_chains_with_tapes,
    scaled_chains,
    uniform_chains,
)

# Sums of the same seconds in another order differ in their last digits.
DIGITS = 1 + 1e-12


def planned(chain: Chain, budget: int, solver: str = "auto") -> Plan:
    """A plan that is made by itself."""
    [found] = plan_each(chain, [budget], solver=solver, cache=False)
    assert isinstance(found, Plan)
    return found


def within_their_gaps(plans: Iterable[Plan]) -> bool:
    """Whether plans by rising budgets are slower than none before by more than their own gaps."""
    least = math.inf
    for plan in plans:
        if plan.seconds > least * (1 + plan.gap) * DIGITS:
            return False
        least = min(least, plan.seconds)
    return True


def by_themselves(chain: Chain, shares: Iterable[float], solver: str = "auto") -> list[Plan]:
    """Plans by rising budgets, between the least and storing everything, each in its own call."""
    most = planned(chain, 2**50, solver)
    low, high = most.least_budget_bytes, max(most.store_all_bytes, most.least_budget_bytes)
    budgets = sorted(max(1, int(low + share * (high - low))) for share in shares)
    return [planned(chain, budget, solver) for budget in budgets]


@pytest.mark.parametrize(("small", "large"), [(139543448, 140127312), (134288674, 134872537)])
def test_a_schedule_that_just_does_not_fit_costs_nothing(small: int, large: int) -> None:
    chain = instance("resnet50_ops")
    assert planned(chain, large).seconds <= planned(chain, small).seconds * DIGITS


@pytest.mark.parametrize("name", ["resnet50_ops", "random_n20_s0", "random_n50_s0"])
def test_seconds_fall_with_the_budget(name: str) -> None:
    chain = instance(name)
    most = planned(chain, 2**50)
    budgets = np.linspace(most.least_budget_bytes, most.store_all_bytes, 24).astype(int).tolist()
    seconds = [planned(chain, budget).seconds for budget in budgets]
    for budget, before, after in zip(budgets[1:], seconds[:-1], seconds[1:], strict=True):
        assert after <= before * DIGITS, (budget, before, after)


def test_plans_of_one_call_fall_too() -> None:
    chain = instance("resnet50_ops")
    most = planned(chain, 2**50)
    low, high = most.least_budget_bytes, most.store_all_bytes
    budgets = np.linspace(low, high, 40).astype(int).tolist()[::-1]  # in any order
    found = plan_each(chain, budgets, cache=False)
    seconds = [plan.seconds for plan in found if isinstance(plan, Plan)]
    assert len(seconds) == len(budgets)
    assert seconds == sorted(seconds)
    for plan, budget in zip(found, budgets, strict=True):
        assert isinstance(plan, Plan)
        assert plan.peak_bytes <= budget
        assert plan.lower_bound_seconds <= plan.seconds


@settings(max_examples=30)
@given(
    st.one_of(scaled_chains(), chains_with_options(), ledger_chains(), parted_chains_with_tapes()),
    st.lists(st.floats(0, 1), min_size=3, max_size=3),
    st.sampled_from(("auto", "chain_dp")),
)
def test_a_plan_is_slower_than_none_of_less_budget_by_more_than_its_gap(
    chain: Chain, shares: list[float], solver: str
) -> None:
    assert within_their_gaps(by_themselves(chain, shares, solver))


@settings(max_examples=15)
@given(
    uniform_chains(),
    st.lists(st.floats(0, 1), min_size=3, max_size=3),
    st.sampled_from(("auto", "revolve")),
)
def test_the_same_of_equal_stages(chain: Chain, shares: list[float], solver: str) -> None:
    assert within_their_gaps(by_themselves(chain, shares, solver))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "solver", "shares"),
    [
        # Plans that just do not fit are found beside each other, where the gap is what is promised.
        ("ode_L8_Nt64", "auto", (0.03, 0.1, 0.3, 0.305, 0.31, 0.315, 0.6)),
        ("resnet50_ops", "auto", (0.2, 0.201, 0.202, 0.5, 0.501)),
        ("random_n100_s0", "chain_dp", (0.1, 0.101, 0.5)),
    ],
)
def test_the_same_of_long_chains(name: str, solver: str, shares: tuple[float, ...]) -> None:
    assert within_their_gaps(by_themselves(instance(name), shares, solver))
