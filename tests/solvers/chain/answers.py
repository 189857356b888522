"""What tests of solvers of chains ask of every answer."""

from __future__ import annotations

import math

from ckptsched.base.errors import InfeasibleBudgetError
from ckptsched.simulator.simulator import simulate
from ckptsched.solvers import Solution
from ckptsched.workload.chain import Chain


def seconds_of(result: Solution | InfeasibleBudgetError) -> float:
    """Seconds of a solution; infinite where there is none."""
    return math.inf if isinstance(result, InfeasibleBudgetError) else result.trace.seconds


def check_result(chain: Chain, budget: int, result: Solution | InfeasibleBudgetError) -> None:
    """What holds for every answer."""
    if isinstance(result, InfeasibleBudgetError):
        assert result.budget_bytes == budget
        assert result.least_budget_bytes is not None
        assert result.least_budget_bytes > budget
    else:
        assert simulate(chain, result.schedule).peak_bytes == result.trace.peak_bytes <= budget
        assert chain.store_all_seconds <= result.lower_bound_seconds + 1e-9
        assert result.lower_bound_seconds <= result.trace.seconds
        assert result.least_budget_bytes <= budget
        assert result.schedule_class == "memory-persistent"
