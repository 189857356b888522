"""Schedules beyond the memory-persistent ones, for chains whose states grow.

Where states never grow, the best memory-persistent schedule is the best of all pinned ones
(docs/theory.md). Where they do, it may pay to keep a small state while much else is kept, and to
run on from it to a larger one later: `sliding_table` finds the best of such schedules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from ..errors import InfeasibleBudgetError
from ..schedule import Schedule
from ..simulator import simulate
from ..trace import Trace
from ..workload import Chain
from .base import AbstractSolver, Solution
from .chain_dp import ChainDp
from .persistence import persistent_is_optimal
from .pinned_bound import pinned_lower_bounds, slot_bytes
from .pinned_sizes import PinnedSizes, pinned_sizes
from .sliding_lowering import Lowering
from .sliding_table import SlidingTable

# Names of classes, as exact_search has them.
_ALL_PINNED = "all pinned schedules"
_ALL = "all schedules"
# A table takes some 250 MB and three seconds at most.
_MOST_NUMBERS = 1.5e7
_MOST_ADDITIONS = 2e9
_MOST_SLOTS = 1000
# Rather than fewer slots than these, checkpoints slide in shorter segments only; and with
# fewer than those nothing is found.
_ENOUGH_SLOTS = 200
_FEWEST_SLOTS = 50
# Rounded sizes may fit where their sum says they do not: schedules for some 5 % more have.
_HEADROOM = 1.05
# Schedules of one table that are written out and simulated, for each budget.
_TRIALS = 40
# Sums of the same seconds in another order differ by less.
_ROUNDING = 1e-12


@final
@dataclass(frozen=True)
class BeyondPersistent(AbstractSolver):
    """The best memory-persistent schedule, or a better one whose checkpoints slide.

    Never worse than chain_dp. The bound holds for all pinned schedules, and where it shows that
    the persistent schedule is the best of them, nothing else is looked for. For a chain with a
    ledger, or of many hundred stages, the bound is what storing everything takes.
    """

    name = "beyond_persistent"

    def solve(self, chain: Chain, budget_bytes: int) -> Solution:
        """Find a cheap pinned schedule within a budget."""
        (result,) = self.solve_each(chain, [budget_bytes])
        if isinstance(result, InfeasibleBudgetError):
            raise result
        return result

    def solve_each(
        self, chain: Chain, budgets: Sequence[int]
    ) -> list[Solution | InfeasibleBudgetError]:
        """Solve for several budgets; those between two powers of two share a table.

        Raises:
            WorkloadError: The chain is too long for chain_dp.
        """
        known = dict(zip(budgets, ChainDp().solve_each(chain, budgets), strict=True))
        bounds = dict(zip(budgets, pinned_lower_bounds(chain, budgets), strict=True))
        sizes, is_optimal = pinned_sizes(chain), persistent_is_optimal(chain)
        groups: dict[int, list[int]] = {}
        for budget, result in known.items():
            if is_optimal and isinstance(result, Solution):  # its bound holds for all, too
                bounds[budget] = max(bounds[budget], result.lower_bound_seconds)
            elif _seconds(result) > bounds[budget] * (1 + _ROUNDING):
                groups.setdefault((budget - sizes.fixed).bit_length(), []).append(budget)
        for group in groups.values():
            tops = {budget: _top(known[budget], budget) - sizes.fixed for budget in group}
            table = _table(sizes, max(tops.values()))
            if table is not None:
                for budget in group:
                    known[budget] = _improve(chain, table, tops[budget], budget, known[budget])
        return [_certified(known[budget], chain, bounds[budget]) for budget in budgets]


def _seconds(result: Solution | InfeasibleBudgetError) -> float:
    return result.trace.seconds if isinstance(result, Solution) else math.inf


def _top(result: Solution | InfeasibleBudgetError, budget: int) -> int:
    """Bytes of the planning model up to which schedules may fit: a ledger charges less."""
    peak = result.trace.planning_peak_bytes if isinstance(result, Solution) else 0
    return int(max(budget, peak) * _HEADROOM)


def _table(sizes: PinnedSizes, top_bytes: int) -> SlidingTable | None:
    """A table as fine as its limits allow; None where it would say nothing."""
    n = len(sizes.state) - 1
    outer = n**3 / 3
    longest = n + 1
    if n**4 / 12 * _ENOUGH_SLOTS > _MOST_ADDITIONS:
        longest = int(max(0.0, 3 * (_MOST_ADDITIONS / _ENOUGH_SLOTS - outer) / n) ** (1 / 3))
    additions = outer + min(n**4 / 12, n * longest**3 / 3)
    numbers = (n + 1) * (n + 2) / 2
    slots = int(min(_MOST_SLOTS, _MOST_NUMBERS / numbers, _MOST_ADDITIONS / additions))
    if slots < _FEWEST_SLOTS or top_bytes < 0:
        return None
    unit = slot_bytes(sizes, top_bytes, slots)
    return SlidingTable(sizes, top_bytes // unit, unit, longest)


def _improve(
    chain: Chain,
    table: SlidingTable,
    top_bytes: int,
    budget: int,
    known: Solution | InfeasibleBudgetError,
) -> Solution | InfeasibleBudgetError:
    """The first of the table's schedules, from the cheapest on, that fits and beats the known."""
    best = _seconds(known) * (1 - _ROUNDING) - chain.store_all_seconds
    extra = table.extra_seconds[: top_bytes // table.unit + 1]
    # The fewest slots for every number of seconds below the best.
    falls = np.flatnonzero((extra < best) & (np.append(np.inf, extra[:-1]) > extra))
    if len(falls) > _TRIALS:
        falls = falls[np.linspace(0, len(falls) - 1, _TRIALS).astype(int)]
    for m in falls[::-1]:
        schedule = Lowering(table).run(int(m))
        trace = simulate(chain, schedule)
        if trace.peak_bytes <= budget:
            if trace.seconds >= _seconds(known):
                break
            return _solution(schedule, trace, known, table.unit)
    return known


def _solution(
    schedule: Schedule, trace: Trace, known: Solution | InfeasibleBudgetError, unit: int
) -> Solution:
    least = known.least_budget_bytes
    return Solution(
        schedule=schedule,
        trace=trace,
        schedule_class=_ALL,
        lower_bound_seconds=0.0,
        least_budget_bytes=trace.peak_bytes if least is None else min(least, trace.peak_bytes),
        rounding_unit_bytes=unit,
    )


def _certified(
    result: Solution | InfeasibleBudgetError, chain: Chain, bound: float
) -> Solution | InfeasibleBudgetError:
    """The result with the bound over all pinned schedules."""
    if isinstance(result, InfeasibleBudgetError):
        return result
    return replace(
        result,
        schedule_class=_ALL if bound <= chain.store_all_seconds else _ALL_PINNED,
        lower_bound_seconds=min(bound, result.trace.seconds),
    )
