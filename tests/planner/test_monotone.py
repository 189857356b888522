"""More budget gives no slower plan, also where each budget is planned in a call of its own."""

from __future__ import annotations

import numpy as np
import pytest

from ckptsched.planner.plan import Plan
from ckptsched.planner.planner import plan_each
from ckptsched.workload.chain import Chain
from tests.support.shared_chains import instance

# Sums of the same seconds in another order differ in their last digits.
DIGITS = 1 + 1e-12


def planned(chain: Chain, budget: int) -> Plan:
    """A plan that is made by itself."""
    [found] = plan_each(chain, [budget], cache=False)
    assert isinstance(found, Plan)
    return found


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
