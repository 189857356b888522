"""The best memory-persistent schedule of any chain, by dynamic programming.

Persistent: once kept, a state or tape stays until the backward has consumed it. Reference:
Beaumont et al. (RR-9302); recurrence and conditions stand in `tables`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import numpy as np

from ...base.budget import format_bytes
from ...base.errors import InfeasibleBudgetError, SolverRefusalError, WorkloadError
from ...schedule.language import Code, Schedule
from ...schedule.trace import Trace
from ...simulator.liveness import blocks_of, snapshot_bytes
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
_LOOKS_STAGES = 200  # of more the search in exact bytes comes to no end, and is cut short
# No more are drawn where one is as near to the bound as this.
_CLOSE = 1e-4
# Levels below a budget at which schedules are drawn at most.
_LEVELS = 64
# Where the ledger charges more than its relaxation: levels within what it may charge, and how often
# the optimum of fewer bytes is looked for.
_PROBES = 32
_TRIALS = 3
# Sums of seconds in another order differ in their last digits.
_DIGITS = 1e-12
# The same, to find the least budget: a small table, and schedules tried with it.
_EDGE_SLOTS = 500
_EDGE_TRIALS = 24


@final
@dataclass(frozen=True)
class Effort:
    """How much `chain_dp` may take to find a plan."""

    numbers: float = 3e8
    """Numbers of 4 bytes in a table."""
    additions: float = 3.5e11
    """Additions for a table of few slots: about half a minute of one core."""
    looks: int = 200_000_000
    """Looks at choices by the search in exact bytes, for one budget alone: some seconds."""
    least_looks: int = 1_500_000
    """The same for each of several budgets, at least."""
    nearest: bool = True
    """Whether a second table is asked, in which sizes are rounded to the nearest slot, where most
    states take less than half a slot."""


@final
@dataclass(frozen=True)
class ChainDp(AbstractSolver):
    """Optimal among memory-persistent schedules, up to rounding.

    Where all sizes share a unit that is not small beside the budget, and the chain has no
    ledger, the schedule is optimal in its class. Else sizes are counted in 1,000 slots or more,
    so that too much fits: the table bounds the seconds from below, and the schedules are those
    that it prefers among what fits in exact bytes. Where those are above the bound, a search in
    exact bytes (`branch_and_bound`) looks for the optimum itself, and finds and proves it on most
    chains of up to some 200 stages. Where most states take less than half a slot, a table of sizes
    rounded to the nearest slot is asked too. The baselines are candidates and, on uniform
    chains, revolve. For a chain with a ledger the sizes bound the ledger from below
    (`sizes`), so that the bound holds in the ledger, and schedules are simulated until one
    fits.

    A larger budget never gives a costlier schedule, within one `solve_each` and between calls: a
    table serves a range of budgets, and its schedules are drawn at levels of memory, that depend
    on the chain alone; a budget has all those below it that its bound does not rule out. Between
    calls that holds where the search in exact bytes ends, or is not made; on chains of more than
    some 200 stages it may end at one budget and not at a larger one, and give a little less there.

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
        found |= search.solve(feasible)
        return [found[budget] for budget in budgets]


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
class _Descent:
    """One budget on its way down the levels at which schedules are drawn."""

    budget: int
    level: int
    """The highest level that is not done, in bytes that states and tapes can use."""
    grain: _Grain
    """How the budget itself is counted."""
    bound: float
    """Seconds that no schedule in the budget is below."""
    is_proven: bool = False
    """Whether what is known cannot be bettered at any level."""
    drawn: list[tuple[int, float]] = field(default_factory=list)
    """Levels at which schedules were drawn from the last table, with their bounds."""


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
    surplus: int = field(init=False)
    """What the ledger charges a schedule beyond the relaxed sizes: at most so many bytes."""
    store_all: Trace = field(init=False)
    last: _Candidate | None = field(init=False, default=None)
    known: dict[bytes, _Candidate] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Find the least budget, and collect what needs no table."""
        chain = self.chain
        self.sizes = chain_sizes(chain)
        self.surplus = _surplus_of(chain)
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

    def solve(self, budgets: Sequence[int]) -> dict[int, Solution]:
        """Solve for budgets, smallest first, with the tables of the ranges that they are in.

        Schedules are drawn at levels of memory that do not depend on the budget, from the highest
        below it down, while lower levels may have cheaper ones by their bounds. So what a smaller
        budget has is found at a larger one as well.
        """
        base = self.chain.store_all_seconds
        descents = [
            _Descent(budget, level, self._grain(level), base)
            for budget in budgets
            for level in [self._usable(budget)]
        ]
        # A budget that fits everything needs no table.
        needed = [x for x in descents if x.budget < self.store_all.peak_bytes]
        looks, waiting = self._looks(max(1, len(needed))), needed
        while waiting:
            # The highest range first: those that go below it join others there.
            grain = self._grain(max(x.level for x in waiting))
            here = [x for x in waiting if self._grain(x.level) == grain]
            rest = [x for x in waiting if x not in here]
            waiting = sorted([*rest, *self._descend(grain, here, looks)], key=lambda x: x.budget)
        return {x.budget: self.solution(x, self._cheapest(x.budget)) for x in descents}

    def _descend(self, grain: _Grain, descents: list[_Descent], looks: int) -> list[_Descent]:
        """Draw schedules with a grain's table or two; gives those that need levels below it."""
        # Rows do not depend on those of more slots: they end where no look goes beyond.
        top = max(x.level for x in descents)
        if not grain.exact:
            top = min(grain.top, int(top * (1 + _MORE[1])) + 2 * grain.unit)
        numbers = table_numbers(self.fewest, top) / grain.unit
        exact = grain.exact and 2 * numbers <= _EXACT_NUMBERS
        table = Table(self.sizes, grain.unit, top, exact=exact)
        for descent in descents:
            if descent.level == self._usable(descent.budget):
                self._begin(table, descent, looks)
        below = [x for x in descents if self._draw_levels(table, x, grain)]
        del table  # before the next takes as much
        missing = [x for x in descents if x.drawn]
        if missing and self.effort.nearest and not grain.exact and self._is_coarse(grain):
            table = Table(self.sizes, grain.unit, top, nearest=True)
            for descent in missing:
                for level, bound in descent.drawn:
                    if bound < self._seconds(descent.budget):
                        self._draw(table, level, bound)
        return below

    def _is_coarse(self, grain: _Grain) -> bool:
        """Whether most states take less than half a slot, so that they are rounded to nothing."""
        return bool(2 * np.median(self.sizes.state[1:]) < grain.unit)

    def _begin(self, table: Table, descent: _Descent, looks: int) -> None:
        """Bound a budget, and look for its optimum in exact bytes."""
        base, own = self.chain.store_all_seconds, descent.level
        descent.bound = base + table.bound(own)
        if not self.surplus:
            level = self._levels(own, descent.grain)[0]
            if self._grain(level) == descent.grain:
                self._draw(table, level, base + table.bound(level))
            descent.bound = base + self._search(table, descent.budget, looks)
            return
        drawn = min(x.extra_seconds for x in self._outlines(table, own, descent.bound))
        found = search(self.fewest, table, own, drawn, looks)
        descent.bound = base + found.bound_seconds
        if descent.bound < self._seconds(descent.budget):
            descent.is_proven = self._probe(table, descent.budget, looks)

    def _probe(self, table: Table, budget: int, looks: int) -> bool:
        """Find the highest level whose optimum fits in exact bytes, where the ledger charges more.

        Levels are halved in a way that does not depend on the budget: which of them are looked at
        depends on what fits alone, and so a larger budget never ends at a lower level.

        Returns:
            Whether all that were looked at gave their optimum.
        """
        own, step = self._usable(budget), -(-self.surplus // _PROBES)
        low, high = 0, 1 << (self.store_all.peak_bytes // step + 1).bit_length()
        is_known, is_proven = False, True
        while high - low > 1 or not is_known:
            middle = (low + high) // 2
            level = max(middle * step, self.fewest.total)
            if level > own:
                high = middle
            elif level + self.surplus <= own and high - low > 1:
                low, is_known = middle, False
            else:
                least, proves = self._optimum(table, level, looks)
                is_proven &= proves
                if self._seconds(budget) <= least * (1 + _DIGITS) or low == middle:
                    low, is_known = middle, True
                else:
                    high = middle
        return is_proven

    def _optimum(self, table: Table, level: int, looks: int) -> tuple[float, bool]:
        """Know cheap schedules of a level; what none is below, and whether one attains it."""
        base = self.chain.store_all_seconds
        drawn = self._draw(table, level, base + table.bound(level))
        found = search(self.fewest, table, level, drawn - base, looks)
        if found.outline is not None:
            drawn = self.draw(found.outline).seconds
        least = base + found.bound_seconds
        return least, drawn - least <= 2 * _DIGITS * drawn

    def _draw_levels(self, table: Table, descent: _Descent, grain: _Grain) -> bool:
        """Draw schedules for a budget level by level, while lower ones may be cheaper.

        Returns:
            Whether they may be below the range of the grain: there the descent is left.
        """
        descent.drawn = []
        if descent.is_proven:
            return False
        base, levels = self.chain.store_all_seconds, self._levels(descent.level, grain)
        edge = self._edge(levels[-1], descent.level, grain)
        for level in (max(x, edge) for x in levels):
            known, bound = self._seconds(descent.budget), base + table.bound(level)
            if known - max(bound, descent.bound) <= _DIGITS * known:
                return False
            if level == edge:
                descent.level = level
                return True
            self._draw(table, level, bound)
            descent.drawn.append((level, bound))
        return False

    def _edge(self, low: int, high: int, grain: _Grain) -> int:
        """The highest level from `low` on that is below the range of a grain; -1 where none is."""
        if self._grain(low) == grain:
            return -1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._grain(middle) == grain else (middle, high)
        return low

    def _levels(self, own: int, grain: _Grain) -> list[int]:
        """The levels at which schedules are drawn, from the highest in so many bytes down."""
        least, unit = self.fewest.total, grain.unit
        levels = range(own - own % unit, max(least, own - own % unit - _LEVELS * unit), -unit)
        return [*levels, least] if len(levels) < _LEVELS else [*levels]

    def _looks(self, budgets: int) -> int:
        """How many choices the exact search may look at for each of so many budgets."""
        share = min(1.0, _LOOKS_STAGES / len(self.chain)) / budgets
        return max(self.effort.least_looks, int(self.effort.looks * share**2))

    def _usable(self, budget: int) -> int:
        """The bytes of a budget that states and tapes can use: all sizes have a common divisor."""
        m = budget - self.sizes.fixed
        return m - m % self.sizes.common_divisor

    def _draw(self, table: Table, level: int, bound: float) -> float:
        """Know schedules of a level that are cheap in the table; the seconds of the cheapest."""
        return min(self.draw(drawn).seconds for drawn in self._outlines(table, level, bound))

    def _outlines(self, table: Table, level: int, bound: float) -> list[Outline]:
        """Schedules of a level that are cheap in the table, up to one that is near the bound."""
        drawn: list[Outline] = []
        enough = bound * (1 + _CLOSE) - self.chain.store_all_seconds
        for scale in self._scales():
            drawn.append(outline(self.fewest, level, table, scale))
            if drawn[-1].extra_seconds <= enough:
                break
        return drawn

    def _search(self, table: Table, budget: int, looks: int) -> float:
        """Search in exact bytes for what is better than the best that is known.

        Returns:
            What no schedule is below, in seconds more than the fastest.
        """
        base, m = self.chain.store_all_seconds, self._usable(budget)
        bound = 0.0
        for trial in range(_TRIALS):
            found = search(self.fewest, table, m, self._seconds(budget) - base, looks)
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

    def _seconds(self, budget: int) -> float:
        """Seconds of the cheapest candidate that fits."""
        return self._best(budget).run(self.chain)[1].seconds

    def _cheapest(self, budget: int) -> _Candidate:
        """The cheapest that fits a budget, no smaller than those before; it is remembered."""
        found = self._best(budget)
        # Equal costs may be estimated in the wrong order, by their last digits.
        seconds = found.run(self.chain)[1].seconds
        if self.last is None or seconds < self.last.run(self.chain)[1].seconds:
            self.last = found
        return self.last

    def solution(self, descent: _Descent, candidate: _Candidate) -> Solution:
        """A candidate that fits, with what is known about the budget."""
        (schedule, trace), bound = candidate.run(self.chain), descent.bound
        if trace.seconds - bound <= 1e-12 * trace.seconds:
            bound = trace.seconds  # the same sums in another order differ in the last digits
        return Solution(
            schedule=schedule,
            trace=trace,
            schedule_class="memory-persistent",
            lower_bound_seconds=bound,
            least_budget_bytes=self.least.peak_bytes,
            rounding_unit_bytes=descent.grain.unit,
        )


def _surplus_of(chain: Chain) -> int:
    """Snapshots of all states, and copies of all buffers; 0 without a ledger."""
    if not chain.has_ledger:
        return 0
    blocks = blocks_of(chain.blocks, len(chain))
    snapshots = snapshot_bytes(blocks, len(chain), chain.random_state_bytes)
    return int(snapshots.sum()) + sum(block.buffer_bytes for block in blocks)
