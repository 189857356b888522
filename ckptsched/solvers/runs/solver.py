"""The best memory-persistent schedules of chains with long runs, as networks of ODE blocks are.

The recurrence of `chain_dp` on the segments that matter (`tables`), and a lower bound that does
not look at places (`lower_bound`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import final

import numpy as np
import numpy.typing as npt

from ...base.errors import InfeasibleBudgetError, SolverRefusalError
from ...schedule.language import Code, Schedule
from ...schedule.trace import Trace
from ...simulator.simulator import simulate
from ...workload.chain import Chain
from ..base import AbstractSolver, Solution, infeasible
from ..baselines import Baseline
from ..binomial.revolve import advances
from ..chain.sizes import ChainSizes, chain_sizes
from ..chain.tables import least_memory
from .find_runs import ChainRuns, Indices, Runs, Seconds, chain_runs
from .lower_bound import RunBound
from .step_groups import Groups, group, group_sizes
from .tables import RunTable
from .to_schedule import lower

# Slots up to which sizes are not rounded where they share a unit, and about as many where not.
_SLOTS = 2_000
# A table of more runs takes minutes; chains without long runs are for chain_dp.
MOST_RUNS = 64
_FEWEST_STAGES_A_RUN = 2
# Ends and starts of lines in a long run, by slots up to which: few slots need exact places, and
# cost little.
_MESHES = ((400, 16, 16), (1 << 62, 3, 4))
# Schedules of slots beyond the budget may fit after all, as sizes are rounded.
_HEADROOM = 1.05
# Schedules that are tried for one budget where sizes are rounded.
_TRIALS = 12
# What more slots must save, of the step, to be tried.
_WORTH = 2e-4
# From so many stages on a run needs no more memory.
_SAME_NEED = 4
# A bound is not raised any more where a plan is so close to it.
_CLOSE = 2e-3
# Schedules with more runs without tape, as estimated, are not made.
MOST_ADVANCES = 8_000_000
# Of a chain with a ledger the least budget is that of a schedule, which is made and simulated: one
# of so many runs takes about a second, and one of the most above twenty.
_LEAST_ADVANCES = 1_000_000
# Numbers in a table of segments inside a run: 0.25 GB.
_NUMBERS = 6e7
MOST_STAGES = int(_NUMBERS / _MESHES[0][0])
"""Of more stages even a table of the fewest slots has too many numbers: there are two or three."""
# Schedules of the fewest slots that are tried to find the least budget.
_LEAST_TRIALS = 4
# Of long ones fewer are: the ledger charges some 100,000 operations a second.
_LEAST_OPERATIONS = 100_000


def takes(chain: Chain) -> bool:
    """Whether a chain has runs long enough for run_dp, and few enough, and tables fit in memory."""
    return len(chain) <= MOST_STAGES and _fits(chain_runs(chain_sizes(chain)))


def _fits(runs: ChainRuns) -> bool:
    number = len(runs.plan)
    return number <= MOST_RUNS and runs.plan.stages >= _FEWEST_STAGES_A_RUN * number


@final
@dataclass(frozen=True)
class RunDp(AbstractSolver):
    """Memory-persistent schedules of chains in which equal stages follow each other.

    For networks of blocks with many equal steps, of any length. Where all sizes share a unit and
    the chain has no ledger, budgets up to 2,000 units are planned without rounding; others with
    sizes rounded to the nearest of some 2,000 slots, and the cheapest schedule is kept that fits
    in exact bytes. The lower bound holds for all memory-persistent schedules, not only for those
    of the segments looked at.

    A larger budget never gives a costlier schedule within one `solve_each`, where budgets share
    tables. Time and memory grow with the longest run and with the number of runs, not with the
    number of stages squared: 8,008 stages in 8 blocks take some seconds and 0.5 GB.
    """

    name = "run_dp"

    def solve_each(
        self, chain: Chain, budgets: Sequence[int]
    ) -> list[Solution | InfeasibleBudgetError]:
        """Solve for several budgets; those of similar size share a table.

        Raises:
            WorkloadError: The chain has no long runs, or more than `MOST_STAGES` stages.
        """
        search = _RunPlanning(chain)
        feasible = sorted({x for x in budgets if x >= search.least_bytes})
        found: dict[int, Solution] = {}
        for grain, group_ in search.grains(feasible).items():
            found |= search.solve(grain, group_)
        return [
            found.get(budget)
            or infeasible(chain, budget, search.least.trace, "known memory-persistent")
            for budget in budgets
        ]


@final
@dataclass(frozen=True, slots=True, order=True)
class _Grain:
    """How finely budgets are planned."""

    unit: int
    """Bytes of a slot."""
    exact: bool
    """Whether nothing is rounded."""
    ends: int
    starts: int


@final
@dataclass(frozen=True, slots=True)
class _Found:
    """A schedule and its simulation."""

    schedule: Schedule
    trace: Trace


@final
@dataclass(eq=False)
class _RunPlanning:
    """What is shared between the budgets of one chain."""

    chain: Chain
    sizes: ChainSizes = field(init=False)
    runs: ChainRuns = field(init=False)
    best: _Found | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Find the runs.

        Raises:
            WorkloadError: They are too short, too many, or of too many stages.
        """
        if len(self.chain) > MOST_STAGES:
            raise SolverRefusalError(
                f"run_dp takes chains of up to {MOST_STAGES} stages, found {len(self.chain)}: its "
                f"tables would need more than {3 * 4 * _NUMBERS / 1e9:.1f} GB; for equal stages "
                'use revolve, for others solver="auto" finds a good every_<k>'
            )
        self.sizes = chain_sizes(self.chain)
        self.runs = chain_runs(self.sizes)
        if not _fits(self.runs):
            raise SolverRefusalError(
                f"run_dp is for chains with long runs of equal stages: at most {MOST_RUNS} runs, "
                f"of {_FEWEST_STAGES_A_RUN} stages on average; found {len(self.runs.plan)} runs "
                f"in {len(self.chain)} stages; for others use chain_dp"
            )

    @functools.cached_property
    def store_all(self) -> _Found:
        """Storing everything."""
        return self._simulated(Baseline("store_all").schedule(self.chain))

    @functools.cached_property
    def fastest_seconds(self) -> float:
        """Seconds of storing everything, with each stage's fastest tape."""
        tapings = self.sizes.tapings
        own = (tapings.start <= len(self.chain)) & (tapings.option == 0)
        return self.chain.store_all_seconds - math.fsum(tapings.extra_seconds[own])

    @functools.cached_property
    def least_bytes(self) -> int:
        """The least budget that is known to work; it depends on the chain alone."""
        table, slots = self._tight
        if table.unit > self.sizes.common_divisor or self.sizes.is_ledger:
            return self.least.trace.peak_bytes
        least = int(slots[0]) * table.unit + self.sizes.fixed
        return min(least, self.store_all.trace.peak_bytes)

    @functools.cached_property
    def least(self) -> _Found:
        """A schedule of least peak; long runs are run very often in it."""
        table, slots = self._tight
        found, operations = [self.store_all], 0
        for m in slots[:_LEAST_TRIALS].tolist():
            found.append(self._simulated(lower(table, m)))
            operations += len(found[-1].schedule)
            if operations > _LEAST_OPERATIONS:
                break
        return min(found, key=lambda x: x.trace.peak_bytes)

    @functools.cached_property
    def _untimed(self) -> ChainRuns:
        """The runs where each stage takes as long.

        The least budget looks at bytes alone: a model that is measured again has other seconds,
        and what was named must still do.
        """
        return chain_runs(self.sizes.untimed())

    @functools.cached_property
    def _tight(self) -> tuple[RunTable, Indices]:
        """A small table, and its slots that have a schedule of reasonable length."""
        runs = self._untimed.plan
        needed = self._least_bytes()
        divisor = self.sizes.common_divisor
        unit = divisor if needed // divisor <= _MESHES[0][0] else max(1, needed // _MESHES[0][0])
        top = needed // unit + 1
        most = _LEAST_ADVANCES if self.sizes.is_ledger else MOST_ADVANCES
        # Tables for fewer states than the closed form of equal stages takes would be in vain.
        top += (_fewest_states(runs, most) - 1) * int(runs.state.max()) // unit
        while True:
            table = RunTable(runs, unit, top, ends=0, starts=0)
            slots = np.flatnonzero(is_short(table, runs, most))
            if len(slots):
                return table, slots
            top += top // 8 + 1

    def _least_bytes(self) -> int:
        """What no schedule needs less than: a run of four stages needs as much as a long one."""
        runs = self._untimed.bound
        keep = np.ones(len(self.chain), dtype=np.bool_)
        for first, count in zip(runs.first.tolist(), runs.count.tolist(), strict=True):
            keep[first - 1 + _SAME_NEED : first - 1 + count] = False
        stages = tuple(x for x, kept in zip(self.chain.stages, keep, strict=True) if kept)
        return least_memory(chain_sizes(replace(self.chain, stages=stages, blocks=()))).total

    def _advances(self, schedule: Schedule) -> Seconds:
        """How often a stage of each run is run without tape."""
        runs = self.runs.bound
        stages = schedule.stages[schedule.codes == Code.FORWARD]
        found = np.bincount(np.searchsorted(runs.last, stages), minlength=len(runs))
        return found / runs.count

    def _simulated(self, schedule: Schedule) -> _Found:
        return _Found(schedule, simulate(self.chain, schedule))

    def grains(self, budgets: Sequence[int]) -> dict[_Grain, list[int]]:
        """Budgets that share a table, smallest first."""
        groups: dict[_Grain, list[int]] = {}
        for budget in budgets:
            groups.setdefault(self._grain(budget), []).append(budget)
        return groups

    def _grain(self, budget: int) -> _Grain:
        m, divisor = budget - self.sizes.fixed, self.sizes.common_divisor
        slots = min(_SLOTS, max(_MESHES[0][0], int(_NUMBERS / len(self.chain))))
        exact = m // divisor <= slots and not self.sizes.is_ledger
        unit = divisor
        if not exact:
            octave = math.ceil(2 * math.log2(m / slots)) if m > slots else 0
            unit = math.ceil(2 ** (octave / 2))
        ends, starts = next((e, s) for most, e, s in _MESHES if m // unit <= most)
        return _Grain(unit, exact, ends, starts)

    def solve(self, grain: _Grain, budgets: Sequence[int]) -> dict[int, Solution]:
        """Solve for budgets of one grain, smallest first, with one table and one bound."""
        fixed, base = self.sizes.fixed, self.fastest_seconds
        found: dict[int, _Found] = {}
        needed = [x for x in budgets if x < self.store_all.trace.peak_bytes]
        if needed:
            plans = _Plans(self, grain, max(needed) - fixed)
            for budget in needed:
                found[budget] = self.best = plans.cheapest(budget)
            del plans
        bound = RunBound(self.runs.bound, max(budgets) - fixed, self.sizes.common_divisor)
        for budget in reversed(needed):
            plan, size = found[budget], budget - fixed
            enough = plan.trace.seconds / (1 + _CLOSE) - base
            if bound.extra_seconds(size) < enough:
                bound.raise_at(size, base, self._advances(plan.schedule), enough)
        solutions = {}
        for budget in budgets:
            best = found.get(budget, self.store_all)
            extra = bound.extra_seconds(budget - fixed) if budget in found else 0.0
            solutions[budget] = Solution(
                schedule=best.schedule,
                trace=best.trace,
                schedule_class="memory-persistent",
                # The same sums in another order may differ in the last digits.
                lower_bound_seconds=min(base + extra, best.trace.seconds),
                least_budget_bytes=self.least_bytes,
                rounding_unit_bytes=grain.unit,
            )
        return solutions


def is_short(table: RunTable, runs: Runs, most: int = MOST_ADVANCES) -> npt.NDArray[np.bool_]:
    """By slots whether there is a schedule, and not one of too many runs to be made."""
    limit = most * float(runs.seconds[runs.seconds > 0].min(initial=math.inf))
    short: npt.NDArray[np.bool_] = np.isfinite(table.extra_seconds)
    return short & (table.extra_seconds <= limit)


def _fewest_states(runs: Runs, most: int) -> int:
    """States kept at once within runs so that they are reversed by so many runs without tape.

    About so many: it is exact where nothing but single tapes and states is kept.
    """
    counts, states = runs.count.tolist(), 1
    while sum(advances(count, states) for count in counts) > most and states < max(counts):
        states += 1
    return states


@final
class _Plans:
    """Schedules of one table, by their slots."""

    def __init__(self, search: _RunPlanning, grain: _Grain, top_bytes: int) -> None:
        """Fill the table."""
        self.search, self.grain = search, grain
        most = top_bytes if grain.exact else int(top_bytes * _HEADROOM)
        runs = search.runs.plan
        exact = np.ones(len(runs), dtype=np.int64)
        sizes = exact if grain.exact else group_sizes(runs, grain.unit, most)
        self.groups: Groups = group(runs, sizes)
        self.table = RunTable(
            self.groups.runs, grain.unit, most // grain.unit, ends=grain.ends, starts=grain.starts
        )
        self.short = is_short(self.table, runs)
        self.known: dict[int, _Found] = {}

    def cheapest(self, budget: int) -> _Found:
        """The cheapest schedule that fits, or the best of smaller budgets."""
        search = self.search
        m = (budget - search.sizes.fixed) // self.grain.unit
        known = [search.best] if search.best else []
        if not self.grain.exact:
            known += self._near(m, budget)
        elif self.short[m]:
            known.append(self._at(m))
        if not known:
            known = [search.least]
        fitting = [x for x in known if x.trace.peak_bytes <= budget]
        return min(fitting, key=lambda x: x.trace.seconds)

    def _at(self, m: int) -> _Found:
        """The schedule of m slots; slots of equal cost have one schedule, that of the fewest."""
        extra = self.table.extra_seconds
        m = int(np.searchsorted(-extra[: m + 1], -extra[m]))
        if m not in self.known:
            schedule = self.groups.expand(lower(self.table, m))
            self.known[m] = self.search._simulated(schedule)
        return self.known[m]

    def _near(self, m: int, budget: int) -> list[_Found]:
        """Schedules that fit, by bisection of the slots: peaks grow with slots, nearly."""
        low = int((~self.short).sum())  # the fewest slots
        high = self.table.top + 1
        found: list[_Found] = []
        if low >= high:
            return []
        step, extra = 1, self.table.extra_seconds
        for _ in range(_TRIALS):
            m = min(max(m, low), high - 1)
            if low >= high:
                break
            best = min((x.trace.seconds for x in found), default=0.0)
            if found and extra[low - 1] - extra[high - 1] < _WORTH * best:
                break
            trial = self._at(m)
            if trial.trace.peak_bytes <= budget:
                found.append(trial)
                low, m = m + 1, m + step if high > self.table.top else (m + 1 + high) // 2
            else:
                high, m = m, m - step if not found else (low + m) // 2
            step *= 2
        return found
