"""The best memory-persistent schedule of any chain, by dynamic programming.

Persistent: once kept, a state or tape stays until the backward has consumed it. Reference:
Beaumont et al. (RR-9302); recurrence and conditions stand in `chain_table`.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np
import numpy.typing as npt

from ..errors import InfeasibleBudgetError, WorkloadError
from ..schedule import Code, Schedule
from ..simulator import simulate
from ..trace import Trace
from ..workload import Chain
from .base import AbstractSolver, Solution, infeasible
from .baselines import Baseline, baselines_for
from .chain_lowering import Guided, lower
from .chain_sizes import ChainSizes, Slots, chain_sizes
from .chain_table import LeastMemory, Table, least_memory, table_numbers
from .revolve import Revolve

# With a unit that divides all sizes, this many slots are solved exactly rather than rounded:
# 2,000 slots take four times as long as the default, and leave no gap.
EXACT_SLOTS = 2_000
# A table of 8-byte numbers takes 1.2 GB at most, and some 20 to 60 seconds to fill.
MOST_NUMBERS = 1.5e8
MOST_ADDITIONS = 2e10
# A chain of 520 stages loses ten percent at 100 slots; with far fewer a plan says little.
FEWEST_SLOTS = 50
# Budgets share a table with those up to this much larger.
_OCTAVE = math.sqrt(2)
# Schedules of slots beyond the budget may fit after all, as sizes are rounded: some for 5 %
# more have been seen to.
_HEADROOM = 1.1
# How much more than the exact bytes guided schedules look for in the rounded table.
_OPTIMISM = (1.0, 1.005, 1.01, 1.02)
# Rounding down loses more than rounding to nearest, so bounds get more slots, while they take
# no more than about half a second and 160 MB.
_BOUND_SLOTS = 20_000
_BOUND_ADDITIONS = 5e8
_BOUND_NUMBERS = 2e7
# Where the ledger needs more than its relaxation: a small table, and schedules tried with it,
# to find the least budget. 5e8 additions take about half a second.
_EDGE_ADDITIONS = 5e8
_EDGE_TRIALS = 24


@final
@dataclass(frozen=True)
class ChainDp(AbstractSolver):
    """Optimal among memory-persistent schedules, up to rounding.

    Where all sizes share a unit that is not small beside the budget, and the chain has no
    ledger, the schedule is optimal in its class. Else sizes are rounded to the nearest of
    about `slots` units, and schedules are simulated in exact bytes, from the cheapest on,
    until one fits: those of the rounded table, those that the table prefers among the choices
    that fit in bytes, the baselines and, on uniform chains, revolve. A second table with sizes
    rounded down gives the lower bound. For a chain with a ledger both tables work with sizes
    that bound the ledger from below (`chain_sizes`), so the bound holds in the ledger.

    A larger budget never gives a costlier schedule within one `solve_each`. Tables depend on
    the chain and on the budget's half-octave below the peak of storing everything, not on the
    budget, so that `solve` and `solve_each` choose from the same tables; `solve` alone does
    not see the schedules of smaller budgets, and may lose the difference of two roundings.

    Time n**3 / 6 * slots additions, memory 4 n**2 * slots bytes.
    """

    slots: int = 500
    """Memory slots in which a budget is measured where it must be rounded."""

    name = "chain_dp"

    def __post_init__(self) -> None:
        """Refuse a number of slots that finds nothing."""
        if self.slots < 1:
            raise WorkloadError(f"chain_dp needs at least one slot, found {self.slots}")

    def solve(self, chain: Chain, budget_bytes: int) -> Solution:
        """Find the cheapest memory-persistent schedule within a budget."""
        (result,) = self.solve_each(chain, [budget_bytes])
        if isinstance(result, InfeasibleBudgetError):
            raise result
        return result

    def solve_each(
        self, chain: Chain, budgets: Sequence[int]
    ) -> list[Solution | InfeasibleBudgetError]:
        """Solve for several budgets; those of a half-octave share a table.

        Raises:
            WorkloadError: The chain is too long for a useful table.
        """
        search = _Search(chain, self.slots)
        found: dict[int, Solution | InfeasibleBudgetError] = {}
        feasible = []
        for budget in sorted(set(budgets)):
            if budget < search.least.peak_bytes:
                found[budget] = infeasible(chain, budget, search.least, "memory-persistent")
            else:
                feasible.append(budget)
        for unit, group in search.groups(feasible):
            found.update(search.solve(unit, group))
        return [found[budget] for budget in budgets]


@final
@dataclass(frozen=True, slots=True)
class _Unit:
    """How bytes are counted: slots of so many bytes, and whether that is exact."""

    bytes: int
    exact: bool


@final
@dataclass(eq=False)
class _Candidate:
    """A schedule that may be the answer; built and simulated when first asked."""

    seconds: float
    """Seconds of the step, known before it is simulated."""
    build: Callable[[], Schedule]
    from_bytes: int = 0
    """It is not tried for budgets below."""
    trial: tuple[Schedule, Trace] | None = None

    def run(self, chain: Chain) -> tuple[Schedule, Trace]:
        """The schedule and its simulation."""
        if self.trial is None:
            schedule = self.build()
            self.trial = schedule, simulate(chain, schedule)
            self.build = lambda: schedule  # lets go of the table that it came from
        return self.trial


@final
@dataclass(eq=False)
class _Search:
    """What is shared between the budgets of one chain."""

    chain: Chain
    slots: int
    sizes: ChainSizes = field(init=False)
    fewest: LeastMemory = field(init=False)
    least: Trace = field(init=False)
    last: _Candidate | None = field(init=False, default=None)
    known: dict[Schedule, _Candidate] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Find the least budget, and collect what needs no table."""
        chain = self.chain
        self.sizes = chain_sizes(chain)
        if self.most_slots < FEWEST_SLOTS:
            raise WorkloadError(
                f"chain_dp takes chains of about a thousand stages at most, found "
                f"{len(chain)}: their table would need more than "
                f"{8 * MOST_NUMBERS / 1e9:.1f} GB or {MOST_ADDITIONS:.0e} additions; "
                'solver="auto" takes chains of any length, "revolve" those of equal stages'
            )
        self.fewest = least_memory(Slots(self.sizes, 1, "nearest"))
        for baseline in baselines_for(chain):
            self.know(baseline.schedule(chain))
        least = self.know(lower(self.fewest, self.fewest.total))
        self.least = least.run(chain)[1]
        if self.least.peak_bytes > self.fewest.total + self.sizes.fixed:
            self._look_for_less()

    @functools.cached_property
    def most_slots(self) -> int:
        """Columns that a table may have."""
        numbers, additions = table_numbers(self.sizes, 1)
        return int(min(MOST_NUMBERS / numbers, MOST_ADDITIONS / additions))

    @functools.cached_property
    def store_all(self) -> Trace:
        """Simulation of storing everything."""
        return simulate(self.chain, Baseline("store_all").schedule(self.chain))

    def know(self, schedule: Schedule) -> _Candidate:
        """Add a schedule to those that are tried for every budget from now on."""
        if schedule not in self.known:
            columns, codes, stages = self.chain.arrays, schedule.codes, schedule.stages
            seconds = (
                columns.forward_seconds[stages[codes <= Code.TAPED_FORWARD]].sum()
                + columns.backward_seconds.sum()
                + self.chain.loss_seconds
            )
            self.known[schedule] = _Candidate(float(seconds), lambda: schedule)
        return self.known[schedule]

    def _look_for_less(self) -> None:
        """Find the least budget where the ledger charges more than its relaxation.

        Deterministic in the chain alone, so that every budget from the least on is met.
        """
        least, fixed = self.fewest.total, self.sizes.fixed
        _, additions = table_numbers(self.sizes, 1)
        top = self.least.peak_bytes - fixed
        slots = int(
            min(self.slots, self.most_slots, max(FEWEST_SLOTS, _EDGE_ADDITIONS / additions))
        )
        unit = max(1, -(-top // slots))
        table = Table(Slots(self.sizes, unit, "nearest"), -(-top // unit))
        for m in np.unique(np.linspace(least, top, _EDGE_TRIALS).astype(np.int64)):
            self.know(lower(self.fewest, int(m)))
            self.know(lower(Guided(self.fewest, table), int(m)))
        for slot in np.unique(np.linspace(table.least, table.top, _EDGE_TRIALS).astype(np.int64)):
            if table.least <= slot <= table.top:
                self.know(lower(table, int(slot)))
        traces = [candidate.run(self.chain)[1] for candidate in self.known.values()]
        self.least = min(traces, key=lambda trace: trace.peak_bytes)

    def groups(self, budgets: Iterable[int]) -> list[tuple[_Unit, list[int]]]:
        """Budgets that share a table, smallest first."""
        groups: dict[_Unit, list[int]] = {}
        for budget in budgets:
            groups.setdefault(self._unit(budget - self.sizes.fixed), []).append(budget)
        return list(groups.items())

    def _unit(self, m: int) -> _Unit:
        """The unit for m bytes: exact where it can be, else by the half-octave of m."""
        top = self.store_all.peak_bytes - self.sizes.fixed
        divisor = self.sizes.common_divisor
        if min(m, top) // divisor < min(EXACT_SLOTS, self.most_slots):
            return _Unit(divisor, exact=True)
        slots = min(self.slots, int(self.most_slots / _OCTAVE / _HEADROOM))
        octave = max(0, math.floor(math.log(top / m, _OCTAVE))) if m < top else 0
        bottom = top / _OCTAVE ** (octave + 1)
        return _Unit(max(1, math.ceil(bottom / slots)), exact=False)

    def solve(self, unit: _Unit, budgets: Sequence[int]) -> list[tuple[int, Solution]]:
        """Solve for budgets of one unit, smallest first, with one table or two."""
        fixed, base = self.sizes.fixed, self.chain.store_all_seconds
        # A budget that fits everything needs no table.
        needed = [budget for budget in budgets if budget < self.store_all.peak_bytes]
        found: dict[int, _Candidate] = {}
        extra, step = np.zeros(1), 1
        if needed:
            top = max(needed) - fixed
            most = top if unit.exact else int(top * _HEADROOM)
            table = Table(Slots(self.sizes, unit.bytes, "nearest"), most // unit.bytes)
            levels = self._levels(table)
            for budget in needed:
                self._guide(table, budget)
                found[budget] = self._cheapest(budget, levels)
            extra, step = table.extra_seconds.copy(), unit.bytes
            del table, levels  # before the next table takes as much
            if not unit.exact and any(found[budget].seconds > base for budget in needed):
                step = self._bound_unit(top, unit.bytes)
                extra = Table(Slots(self.sizes, step, "down"), top // step).extra_seconds
        found |= {budget: self._cheapest(budget) for budget in budgets if budget not in found}
        bounds = [extra[min((x - fixed) // step, len(extra) - 1)] for x in budgets]
        return [
            (budget, self.solution(found[budget], base + float(bound), unit))
            for budget, bound in zip(budgets, bounds, strict=True)
        ]

    def _bound_unit(self, top: int, unit: int) -> int:
        """The unit of the lower bound: finer than the table's where that costs little."""
        numbers, additions = table_numbers(self.sizes, 1)
        slots = min(_BOUND_SLOTS, _BOUND_NUMBERS / numbers, _BOUND_ADDITIONS / additions)
        return min(unit, max(1, -(-top // max(int(slots), 1))))

    def _levels(self, table: Table) -> list[_Candidate]:
        """One candidate for each distinct cost in the table, at the fewest slots that have it."""
        extra, fixed, unit = table.extra_seconds, self.sizes.fixed, table.sizes.unit
        slots = [m for m in range(table.least, table.top + 1) if _falls(extra, m)]

        def build(m: int) -> Callable[[], Schedule]:
            return lambda: lower(table, m)

        return [
            _Candidate(
                self.chain.store_all_seconds + float(extra[m]),
                build(m),
                from_bytes=int(m * unit / _HEADROOM) + fixed,
            )
            for m in slots
        ]

    def _guide(self, table: Table, budget: int) -> None:
        """Add schedules that fit in (relaxed) bytes, and are cheap in the table."""
        if table.sizes.unit == self.sizes.common_divisor and not self.sizes.is_ledger:
            return  # the table itself is exact
        for optimism in _OPTIMISM:
            guided = Guided(self.fewest, table, optimism)
            self.know(lower(guided, budget - self.sizes.fixed))

    def _cheapest(self, budget: int, levels: Sequence[_Candidate] = ()) -> _Candidate:
        """The cheapest candidate that fits; it is remembered for larger budgets."""
        if self.chain.is_uniform:
            with contextlib.suppress(InfeasibleBudgetError):
                self.know(Revolve().solve(self.chain, budget).schedule)
        for candidate in sorted((*self.known.values(), *levels), key=lambda x: x.seconds):
            if candidate.from_bytes <= budget:
                schedule, trace = candidate.run(self.chain)
                if trace.peak_bytes <= budget:
                    found = self.known.setdefault(schedule, candidate)
                    # Equal costs may be estimated in the wrong order, by their last digits.
                    if self.last is None or trace.seconds < self.last.run(self.chain)[1].seconds:
                        self.last = found
                    return self.last
        raise AssertionError("the schedule of least memory fits every budget from the least on")

    def solution(self, candidate: _Candidate, bound: float, unit: _Unit) -> Solution:
        """A candidate that fits, with what is known about the budget."""
        schedule, trace = candidate.run(self.chain)
        return Solution(
            schedule=schedule,
            trace=trace,
            schedule_class="memory-persistent",
            # The same sums in another order may differ in the last digits.
            lower_bound_seconds=min(bound, trace.seconds),
            least_budget_bytes=self.least.peak_bytes,
            rounding_unit_bytes=unit.bytes,
        )


def _falls(extra: npt.NDArray[np.float64], m: int) -> bool:
    """Whether m slots are cheaper than one fewer, by more than the last digits."""
    if m == 0 or math.isinf(extra[m]) or math.isinf(extra[m - 1]):
        return not math.isinf(extra[m])
    return bool(extra[m] < extra[m - 1] - 1e-12 * max(1.0, extra[m - 1]))
