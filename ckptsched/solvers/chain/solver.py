"""The best memory-persistent schedule of any chain, by dynamic programming.

Persistent: once kept, a state or tape stays until the backward has consumed it. Reference:
Beaumont et al. (RR-9302); recurrence and conditions stand in `tables`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import numpy as np

from ...base.budget import format_bytes
from ...base.errors import InfeasibleBudgetError, SolverRefusalError, WorkloadError
from ...schedule.language import Code, Schedule
from ...schedule.trace import Trace
from ...simulator.simulator import simulate
from ...workload.chain import Chain
from ..base import AbstractSolver, Solution, infeasible
from ..baselines import baselines_for
from ..binomial.revolve import Revolve
from .branch_and_bound import search
from .sizes import ChainSizes, chain_sizes
from .tables import LeastMemory, Table, least_memory, table_numbers, table_splits
from .to_schedule import Outline, fastest_outline, outline

# A table has at most so many slots, more where it is small, and so many numbers of 4 bytes. It
# serves a range of budgets, of which the smallest has `_USEFUL_SLOTS` where that can be.
_SLOTS = (8_000, 64_000)
_ADDITIONS = 2e8
_NUMBERS = 1.25e8
_USEFUL_SLOTS = 1_000
_LEAST_SPAN, _MOST_SPAN = 2.0, 8.0
_EXACT_NUMBERS = 2.5e8  # where it is exact it may take 1 GB
# With fewer slots a plan says little; to look at a split takes as long as so many additions.
_FEWEST_SLOTS = 100
_SPLIT_ADDITIONS = 300
# How many schedules are drawn from a table for a budget: some at least, more on short chains.
# Each looks the table up for a little less memory than there is, as rounding lets too much fit,
# or for a little more.
_DRAWN = (12, 60)
_DRAWN_STAGES = 6_000
_LESS = (0.0002, 0.04)
_MORE = (0.0002, 0.01)
_LOOKS_STAGES = 250  # of more the search in exact bytes comes to no end, and is cut short
# No more are drawn where one is as near to the bound as this.
_CLOSE = 1e-4
# Where the ledger charges more than its relaxation: how often schedules of fewer bytes are drawn,
# and how many of one draw are simulated.
_DRAWS = 8
_TRIALS = 3
# The same, to find the least budget: a small table, and schedules tried with it.
_EDGE_SLOTS = 500
_EDGE_TRIALS = 24
# For fronts: how many of the steps of a table are drawn at the most.
_MOST_STEPS = 256


@final
@dataclass(frozen=True)
class Effort:
    """How much `chain_dp` may take to find a plan."""

    numbers: float = 3e8
    """Numbers of 4 bytes in a table."""
    additions: float = 3.5e11
    """Additions for a table of few slots: about half a minute of one core."""
    looks: int = 64_000_000
    """Looks at choices by the search in exact bytes, for one budget alone: 16 million take
    one second, or five where the table is large."""
    least_looks: int = 1_500_000
    """The same for each of several budgets, at least."""
    poor: float = 0.006
    """How much above the bound, as a share of it, the best schedule must be for a second table, in
    which sizes are rounded to the nearest slot."""


@final
@dataclass(frozen=True)
class ChainDp(AbstractSolver):
    """Optimal among memory-persistent schedules, up to rounding.

    Where all sizes share a unit that is not small beside the budget, and the chain has no
    ledger, the schedule is optimal in its class. Else sizes are counted in 1,000 slots or more,
    so that too much fits: the table bounds the seconds from below, and the schedules are those
    that it prefers among what fits in exact bytes. Where those are above the bound, a search in
    exact bytes (`branch_and_bound`) looks for the optimum itself, and finds and proves it on most
    chains of up to some 200 stages. Where the best is not near the bound, a table of sizes rounded
    to the nearest slot is asked too. The baselines are candidates and, on uniform
    chains, revolve. For a chain with a ledger the sizes bound the ledger from below
    (`sizes`), so that the bound holds in the ledger, and schedules are simulated until one
    fits.

    A larger budget never gives a costlier schedule within one `solve_each`. A table serves a
    range of budgets that depends on the chain alone, whichever are asked for.

    Less than n**3 / 6 * slots additions and 2 n**2 * slots bytes for a table, twice that with a
    ledger. Where that is too much slots are larger, as the solution's rounding unit says.
    """

    slots: int | None = None
    """Where sizes must be rounded, slots of the one table that serves all budgets. None takes as
    many slots as are of use, in several tables where memory is short."""
    effort: Effort = Effort()
    """What it may take."""

    name = "chain_dp"

    def __post_init__(self) -> None:
        """Refuse a number of slots that finds nothing."""
        if self.slots is not None and self.slots < 1:
            raise WorkloadError(f"chain_dp needs at least one slot, found {self.slots}")

    def solve_each(
        self, chain: Chain, budgets: Sequence[int]
    ) -> list[Solution | InfeasibleBudgetError]:
        """Solve for several budgets; those of an octave share a table.

        Raises:
            WorkloadError: The chain is too long for a useful table.
        """
        search = _ChainPlanning(chain, self.slots, self.effort)
        found: dict[int, Solution | InfeasibleBudgetError] = {}
        feasible = []
        for budget in sorted(set(budgets)):
            if budget < search.least.peak_bytes:
                found[budget] = infeasible(chain, budget, search.least, "memory-persistent")
            else:
                feasible.append(budget)
        if chain.is_uniform and feasible:
            for result in Revolve().solve_each(chain, feasible):
                if isinstance(result, Solution):
                    search.know(result.schedule)
        search.least_asked = feasible[0] if len(feasible) > 1 else None
        for grain, group in search.groups(feasible):
            found.update(search.solve(grain, group))
        seen = search.front() if len(feasible) > 1 else ()
        return [
            replace(x, seen=seen) if isinstance(x, Solution) else x
            for x in map(found.__getitem__, budgets)
        ]


@final
@dataclass(frozen=True, slots=True)
class _Grain:
    """How bytes are counted: slots of so many bytes, whether that is exact, and up to where."""

    unit: int
    exact: bool
    top: int
    """0 where it does not matter: the largest budget of those asked for."""


@final
@dataclass(eq=False)
class _Candidate:
    """A schedule that may be the answer; built and simulated when first asked."""

    seconds: float
    """Seconds of the step, known before it is simulated, up to the last digits."""
    build: Callable[[], Schedule]
    trial: tuple[Schedule, Trace] | None = None

    def run(self, chain: Chain) -> tuple[Schedule, Trace]:
        """The schedule and its simulation."""
        if self.trial is None:
            schedule = self.build()
            self.trial = schedule, simulate(chain, schedule)
        return self.trial


@final
@dataclass(eq=False)
class _ChainPlanning:
    """What is shared between the budgets of one chain."""

    chain: Chain
    slots: int | None
    effort: Effort
    sizes: ChainSizes = field(init=False)
    fewest: LeastMemory = field(init=False)
    least: Trace = field(init=False)
    store_all: Trace = field(init=False)
    last: _Candidate | None = field(init=False, default=None)
    least_asked: int | None = field(init=False, default=None)
    """The least of several budgets, from which on every step of a table is drawn; else None."""
    known: dict[bytes, _Candidate] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Find the least budget, and collect what needs no table."""
        chain = self.chain
        self.sizes = chain_sizes(chain)
        self._check_length()
        self.fewest = least_memory(self.sizes)
        for baseline in baselines_for(chain):
            self.know(baseline.schedule(chain))
        self.store_all = self.draw(fastest_outline(self.sizes)).run(chain)[1]
        self.least = self.draw(outline(self.fewest, self.fewest.total)).run(chain)[1]
        if self.least.peak_bytes > self.fewest.total + self.sizes.fixed:
            self._look_for_less()

    def _check_length(self) -> None:
        """Refuse a chain whose coarsest table would take minutes."""
        least = table_splits(self.sizes) * (_FEWEST_SLOTS + _SPLIT_ADDITIONS)
        if least > self.effort.additions:
            raise SolverRefusalError(
                f"chain_dp takes chains of up to about 1,700 stages, found {len(self.chain)}: a "
                f"table of {_FEWEST_SLOTS} slots would need {least:.1e} additions, more than "
                f'{self.effort.additions:.1e}; solver="auto" takes chains of any length, "revolve" '
                "those of equal stages"
            )

    def know(self, schedule: Schedule) -> None:
        """Add a schedule to those that are tried for every budget from now on."""
        columns, codes, stages = self.chain.arrays, schedule.codes, schedule.stages
        seconds = (
            columns.forward_seconds[stages[codes <= Code.TAPED_FORWARD]].sum()
            + columns.backward_seconds.sum()
            + self.chain.loss_seconds
        )
        key = hash(schedule).to_bytes(8, signed=True)
        self.known.setdefault(key, _Candidate(float(seconds), lambda: schedule))

    def draw(self, drawn: Outline) -> _Candidate:
        """The candidate of an outline; the one that is known if it came up before."""
        seconds = self.chain.store_all_seconds + drawn.extra_seconds
        return self.known.setdefault(drawn.events.tobytes(), _Candidate(seconds, drawn.build))

    def _look_for_less(self) -> None:
        """Find the least budget where the ledger charges more than its relaxation.

        It looks at bytes alone: a model that is measured again has other seconds, and what was
        named as its least budget must still do. So all that it has seen is kept as known.
        """
        fewest = replace(self.fewest, sizes=self.sizes.untimed())
        least = fewest.total
        top = self.least.peak_bytes - self.sizes.fixed
        unit = max(self._unit(top, self.effort.numbers), -(-top // _EDGE_SLOTS))
        table = Table(fewest.sizes, unit, top)
        for m in np.unique(np.linspace(least, top, _EDGE_TRIALS).astype(np.int64)):
            self.know(outline(fewest, int(m)).build())
            for scale in (1.0, 0.98, 0.95):
                self.know(outline(fewest, int(m), table, scale).build())
        traces = [candidate.run(self.chain)[1] for candidate in self.known.values()]
        self.least = min(traces, key=lambda trace: trace.peak_bytes)

    def groups(self, budgets: Iterable[int]) -> list[tuple[_Grain, list[int]]]:
        """Budgets that share a table, smallest first."""
        groups: dict[_Grain, list[int]] = {}
        for budget in budgets:
            groups.setdefault(self._grain(budget - self.sizes.fixed), []).append(budget)
        return list(groups.items())

    def _grain(self, m: int) -> _Grain:
        """The slots for m bytes: exact where they can be, else those of its range."""
        top = self.store_all.peak_bytes - self.sizes.fixed
        divisor = self.sizes.common_divisor
        if self._unit(min(m, top), min(_EXACT_NUMBERS, self.effort.numbers)) <= divisor:
            return _Grain(divisor, exact=True, top=0)
        while True:
            unit = max(self._unit(top, self.effort.numbers), top // _USEFUL_SLOTS)
            unit = min(unit, self._unit(top, min(_NUMBERS, self.effort.numbers)))
            span = min(max(_LEAST_SPAN, top / unit / _USEFUL_SLOTS), _MOST_SPAN)
            if self.slots is not None or m * span > top:
                self._check_memory(top)
                return _Grain(unit, exact=False, top=top)
            top = math.ceil(top / span)

    def _unit(self, top: int, numbers: float) -> int:
        """The smallest unit whose table has no more slots and numbers than it may, in bytes."""
        few, many = _SLOTS
        slots = self.slots or min(max(few, int(_ADDITIONS / table_splits(self.sizes))), many)
        return max(1, math.ceil(table_numbers(self.fewest, top) / numbers), -(-top // slots))

    def _check_memory(self, top: int) -> None:
        """Refuse where fewer slots than are of use would take too much memory."""
        needed = table_numbers(self.fewest, top) * _FEWEST_SLOTS / top
        if needed > self.effort.numbers:
            raise SolverRefusalError(
                f"the table of chain_dp for {len(self.chain)} stages would need "
                f"{format_bytes(int(4 * needed))} for {_FEWEST_SLOTS} slots, more than the "
                f"{format_bytes(int(4 * self.effort.numbers))} that it may take; "
                'solver="auto" takes chains of any length'
            )

    def solve(self, grain: _Grain, budgets: Sequence[int]) -> list[tuple[int, Solution]]:
        """Solve for budgets of one grain, smallest first, with one table or two."""
        base = self.chain.store_all_seconds
        bounds = dict.fromkeys(budgets, base)
        # A budget that fits everything needs no table.
        needed = [budget for budget in budgets if budget < self.store_all.peak_bytes]
        if needed:
            top = grain.top or self._usable(needed[-1])
            numbers = table_numbers(self.fewest, top) / grain.unit
            exact = grain.exact and 2 * numbers <= _EXACT_NUMBERS
            table = Table(self.sizes, grain.unit, top, exact=exact)
            bounds |= {budget: base + table.bound(self._usable(budget)) for budget in needed}
            poor = self._draw_each(table, {x: bounds[x] for x in needed}, exact=grain.exact)
            for budget in needed:
                looks = self._looks(len(needed))
                bounds[budget] = base + self._search(table, budget, looks)
            if self.least_asked is not None:
                self._draw_steps(table, self._usable(self.least_asked), top)
            poor = [x for x in poor if self._best(x).seconds > bounds[x] * (1 + self.effort.poor)]
            del table  # before the next takes as much
            if poor and not grain.exact:
                table = Table(self.sizes, grain.unit, top, nearest=True)
                self._draw_each(table, {x: bounds[x] for x in poor}, exact=False)
        return [
            (budget, self.solution(self._cheapest(budget), bounds[budget], grain))
            for budget in budgets
        ]

    def _looks(self, budgets: int) -> int:
        """How many choices the exact search may look at for each of so many budgets."""
        share = min(1.0, _LOOKS_STAGES / len(self.chain)) / budgets
        return max(self.effort.least_looks, int(self.effort.looks * share**2))

    def _usable(self, budget: int) -> int:
        """The bytes of a budget that states and tapes can use: all sizes have a common divisor."""
        m = budget - self.sizes.fixed
        return m - m % self.sizes.common_divisor

    def _draw_each(self, table: Table, bounds: dict[int, float], *, exact: bool) -> list[int]:
        """Draw schedules for budgets, smallest first; those whose schedule may be much too dear."""
        poor, least = [], math.inf
        for budget, bound in bounds.items():
            if least > bound:  # else that of a smaller budget cannot be bettered
                found = self._draw(table, budget, bound, exact=exact)
                least = min(least, found)
                if found > bound * (1 + self.effort.poor):
                    poor.append(budget)
        return poor

    def _draw_steps(self, table: Table, low: int, high: int) -> None:
        """Know a schedule for every step of a table between two sizes, or many of them."""
        row = table.row(1, len(self.sizes) + 1)
        steps = np.flatnonzero(row[1:] < row[:-1]) + 1
        sizes = steps * table.slots.unit
        sizes = sizes[(sizes >= max(low, self.fewest.total)) & (sizes <= high)]
        if len(sizes) > _MOST_STEPS:
            sizes = sizes[np.linspace(0, len(sizes) - 1, _MOST_STEPS).astype(np.int64)]
        for m in sizes.tolist():
            self.draw(outline(self.fewest, m, table)).run(self.chain)

    def _draw(self, table: Table, budget: int, bound: float, *, exact: bool) -> float:
        """Know schedules that are cheap in the table; the seconds of the best that fits."""
        m = self._usable(budget)
        for _ in range(_DRAWS):
            drawn = []
            for scale in (1.0,) if exact else self._scales():
                drawn.append(self.draw(outline(self.fewest, m, table, scale)))
                if drawn[-1].seconds <= bound * (1 + _CLOSE):
                    break
            peaks = []
            for candidate in sorted(drawn, key=lambda x: x.seconds)[:_TRIALS]:
                trace = candidate.run(self.chain)[1]
                if trace.peak_bytes <= budget:
                    return trace.seconds
                peaks.append(trace.peak_bytes)
            m -= min(peaks) - budget
            if m < self.fewest.total:
                break
        return math.inf

    def _search(self, table: Table, budget: int, looks: int) -> float:
        """Search in exact bytes for what is better than the best that is known.

        Returns:
            What no schedule is below, in seconds more than the fastest.
        """
        base, m = self.chain.store_all_seconds, self._usable(budget)
        bound = 0.0
        for trial in range(_TRIALS):
            best = self._best(budget).run(self.chain)[1].seconds
            found = search(self.fewest, table, m, best - base, looks)
            if trial == 0:
                bound = found.bound_seconds
            if found.outline is None:
                break
            m -= self.draw(found.outline).run(self.chain)[1].peak_bytes - budget
            # Only a ledger charges more than the recurrence counts.
            if m >= self._usable(budget) or m < self.fewest.total:
                break
        return bound

    def _scales(self) -> list[float]:
        """How much bytes count where a table is looked up, in turn."""
        least, most = _DRAWN
        count = min(max(least, _DRAWN_STAGES // len(self.chain)), most)
        less = 1 - np.geomspace(*_LESS, 3 * count // 4)
        more = 1 + np.geomspace(*_MORE, count // 4)
        return [1.0, *less.tolist(), *more.tolist()]

    def _best(self, budget: int) -> _Candidate:
        """The cheapest candidate that fits."""
        for candidate in sorted(self.known.values(), key=lambda x: x.seconds):
            if candidate.run(self.chain)[1].peak_bytes <= budget:
                return candidate
        raise AssertionError("the schedule of least memory fits every budget from the least on")

    def _cheapest(self, budget: int) -> _Candidate:
        """The cheapest that fits a budget, no smaller than those before; it is remembered."""
        found = self._best(budget)
        # Equal costs may be estimated in the wrong order, by their last digits.
        seconds = found.run(self.chain)[1].seconds
        if self.last is None or seconds < self.last.run(self.chain)[1].seconds:
            self.last = found
        return self.last

    def front(self) -> tuple[Schedule, ...]:
        """What was simulated so far, without what is no faster than something smaller."""
        trials = [x.trial for x in self.known.values() if x.trial is not None]
        found, least = [], math.inf
        for schedule, trace in sorted(trials, key=lambda x: (x[1].peak_bytes, x[1].seconds)):
            if trace.seconds < least:
                found.append(schedule)
                least = trace.seconds
        return tuple(found)

    def solution(self, candidate: _Candidate, bound: float, grain: _Grain) -> Solution:
        """A candidate that fits, with what is known about the budget."""
        schedule, trace = candidate.run(self.chain)
        if trace.seconds - bound <= 1e-12 * trace.seconds:
            bound = trace.seconds  # the same sums in another order differ in the last digits
        return Solution(
            schedule=schedule,
            trace=trace,
            schedule_class="memory-persistent",
            lower_bound_seconds=bound,
            least_budget_bytes=self.least.peak_bytes,
            rounding_unit_bytes=grain.unit,
        )
