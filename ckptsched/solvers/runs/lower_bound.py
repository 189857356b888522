"""A lower bound for memory-persistent schedules of chains with long runs.

Relaxation: how many stages a run has is free, but each stage of run r pays a price p_r. A schedule
of the chain itself pays sum p_r N_r, so that for any prices

    E(chain, m) >= sum p_r N_r + min over relaxed schedules of (extra seconds - prices paid).

The minimum has no places in it: only the runs in which a segment starts and ends count. With k for
how often its stages are run without tape before (the left turns on the way to it), and with sizes
rounded down, V(k,a,b,m), the least of sum (k' u_r - p_r) over the stages of segments from run a to
run b, follows a recurrence with some R**2 rows a level k; docs/concepts/theory-runs.md proves it.
The bound is concave in the prices, and its supergradient is N_r less the stages that the minimiser
has. The best prices are found by cutting planes in a box around the best so far. One evaluation
bounds all budgets.

Reference: Lagrangian relaxation as in Geoffrion, Mathematical Programming Study 2, 1974; cutting
planes as in Kelley, J. SIAM 8(4), 1960.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, final

import numpy as np
import numpy.typing as npt

from ...base.progress import report
from ..quiet_highs import quiet_highs
from .find_runs import Runs, Seconds, run_slots

if TYPE_CHECKING:
    from .lower_bound_kernel import Relaxed

# Slots up to which a unit that divides all sizes is used, and which others are rounded to.
_SLOTS = 4096
# Prices are looked for in so many slots first: the best ones hardly differ, at a fifth of the time.
_SCOUTED = 1024
# How far the first step may go, in prices: from a guess, and from prices of coarser slots.
_REACH, _REACH_AFTER_SCOUT = 0.4, 0.1
# Highest price of a stage by its run's stages, in its seconds: one more stage needs no more runs
# without tape than the run has stages, unless nothing fits, where prices would grow for ever.
_DEAREST = 2.0
# Additions that it takes as long to call a kernel.
_CALL = 3000
# Numbers in a table that is kept as a whole: 80 MB.
_NUMBERS = 1e7
# Evaluations for one budget.
_EVALUATIONS = 60
# Additions that are spent on better prices in any case: some hundredths of a second.
_FREE = 1e8
# Additions after which the prices found so far must do: some five seconds.
_MOST_ADDITIONS = 5e9
# A better bound than the best is looked for while the cuts promise this much of the step.
_TOLERANCE = 5e-5
# Kept states of fewer slots are counted by the slots that many of them fill.
_SMALL = 24
# The sums of a table have some thousand terms, each rounded to 1e-16 of the largest.
_ROUNDING = 1e-10


@final
class RunBound:
    """Lower bounds of extra seconds, for every budget up to one."""

    def __init__(
        self, runs: Runs, top_bytes: int, unit: int, most_slots: int | None = None
    ) -> None:
        """Prepare; nothing is computed yet.

        Args:
            runs: The runs, with the sizes to bound with.
            top_bytes: Most bytes of interest, less what is there all the time.
            unit: A common divisor of all sizes.
            most_slots: Slots up to which sizes are not rounded, and which others are rounded to.
        """
        self.runs = runs
        slots = most_slots or _SLOTS
        is_exact = top_bytes // unit <= slots
        self.scout: RunBound | None = None
        if not is_exact and slots > _SCOUTED:
            self.scout = RunBound(runs, top_bytes, unit, _SCOUTED)
        self.unit = unit if is_exact else -(-top_bytes // slots)
        self.top = top_bytes // self.unit
        self.relaxed = _relaxed(runs, self.unit)
        # A stage that costs no memory to keep can have no price.
        self.priced = np.flatnonzero((runs.count > 1) & (runs.state > 0) & (runs.seconds > 0))
        self.best = np.full(self.top + 1, -np.inf)
        self.prices: Seconds = np.zeros(len(runs))
        # Best prices by what a stage's runs without tape cost in a good schedule: 1 to 2, as costs
        # grow as a power of the length. Where prices are too high the bound falls steeply.
        self.markup: Seconds = np.full(len(self.priced), 0.9)

    def extra_seconds(self, size: int) -> float:
        """What no schedule in so many bytes is below, of all prices tried so far.

        Args:
            size: Bytes, less what is there all the time.

        Returns:
            Seconds more than storing everything; infinite where nothing fits.
        """
        found = max(0.0, float(self.best[min(size // self.unit, self.top)]))
        return max(found, self.scout.extra_seconds(size)) if self.scout else found

    def raise_at(
        self, size: int, seconds: float, advances: Seconds, enough: float = math.inf
    ) -> None:
        """Look for the best prices for one budget.

        Args:
            size: Bytes, less what is there all the time.
            seconds: Seconds of storing everything, to which differences are compared.
            advances: How often a stage of each run is run without tape in a good schedule.
            enough: A bound, in extra seconds, that need not be raised further.
        """
        m = min(size // self.unit, self.top)
        if not len(self.priced):
            self._evaluate(m)
            return
        unit_seconds = self.runs.seconds[self.priced]
        guess = np.maximum(advances[self.priced], 0.25) * unit_seconds
        if self.scout:
            self.scout.raise_at(size, seconds, advances, enough)
            if self.extra_seconds(size) >= enough:
                return
            guess, self.markup = guess * self.scout.markup, np.ones(len(self.priced))
        most: Seconds = _DEAREST * self.runs.count[self.priced].astype(np.float64)
        self.prices[self.priced] = np.minimum(guess * self.markup, most * unit_seconds)
        radius = _REACH_AFTER_SCOUT if self.scout else _REACH
        cuts = _Cuts(unit_seconds, radius, most)
        work = 0.0
        for i in range(_EVALUATIONS):
            report("lower bound", i / _EVALUATIONS)
            if work > _MOST_ADDITIONS:
                break
            bound = self._evaluate(m)
            if math.isinf(bound):
                return
            work += self.levels.additions
            missing = (self.runs.count - self.levels.used())[self.priced]
            prices = cuts.next(self.prices[self.priced], bound, missing)
            if (
                prices is None
                or (cuts.bound >= enough and work > _FREE)
                or cuts.promise < _TOLERANCE * (seconds + max(bound, 0.0))
            ):
                break
            self.prices[self.priced] = prices
        self.markup = np.clip(cuts.center / guess, 0.5, 4)

    def _evaluate(self, m: int) -> float:
        """The bound of the prices; all budgets up to m slots profit."""
        runs, number = self.runs, len(self.runs)
        worth = np.zeros(number)
        worth[self.priced] = self.prices[self.priced] / runs.seconds[self.priced]
        self.levels = _Levels(self.relaxed, self.prices.copy(), math.ceil(worth.max()) + 1, m)
        paid = float(self.prices @ runs.count)
        row = self.levels.batch(0)[0, 0, number] + paid
        row -= _ROUNDING * (paid + np.where(np.isinf(row), 0, np.abs(row)))
        np.maximum(self.best[: m + 1], row, out=self.best[: m + 1])
        return float(row[m])


@final
class _Levels:
    """Least reduced costs at given prices, by earlier runs k = 0..top.

    Levels are kept in batches: of all but one, the first level alone, from which the batch before
    is filled again when it is asked for.
    """

    def __init__(self, relaxed: Relaxed, prices: Seconds, top: int, m: int) -> None:
        """Fill all levels, from the top down.

        Args:
            relaxed: The sizes.
            prices: What a stage of each run pays.
            top: Earlier runs from which on no stage pays any more.
            m: Most slots of interest.
        """
        self.relaxed, self.prices, self.top = relaxed, prices, top
        number = len(relaxed.stages)
        self.shape = number + 1, number + 1, m + 1
        self.size = max(math.isqrt(top) + 1, min(top + 1, int(_NUMBERS / math.prod(self.shape))))
        self.firsts: dict[int, npt.NDArray[np.float64]] = {}
        self.at = -1
        self.levels = np.empty((self.size + 1, *self.shape))
        for batch in range(top // self.size, -1, -1):
            self.batch(batch)
            self.firsts[batch] = self.levels[0].copy()

    def batch(self, number: int) -> npt.NDArray[np.float64]:
        """Levels number * size to (number + 1) * size."""
        from . import lower_bound_kernel as run_bound_kernel

        if number != self.at:
            self.at, first = number, number * self.size
            if number + 1 in self.firsts:
                self.levels[self.size] = self.firsts[number + 1]
            for k in range(min(first + self.size - 1, self.top), first - 1, -1):
                i = k - first
                run_bound_kernel.fill(
                    *(self.levels[i], self.levels[i + 1], self.relaxed, self.prices),
                    *(k, k == self.top),
                )
        return self.levels

    @property
    def additions(self) -> float:
        """About how many additions it takes to fill all levels and to follow the cheapest."""
        runs = len(self.relaxed.stages)
        return (self.top + 1) * (runs**3 / 3 * self.shape[2] + _CALL)

    def used(self) -> Seconds:
        """Stages of each run that the cheapest relaxed schedule has."""
        from . import lower_bound_kernel as run_bound_kernel

        number = len(self.relaxed.stages)
        weight = np.zeros((2, *self.shape))
        weight[0, 0, number, -1] = 1
        used = np.zeros(number)
        for k in range(self.top + 1):
            levels, i = self.batch(k // self.size), k % self.size
            tally = run_bound_kernel.Tally(weight[k % 2], weight[(k + 1) % 2], used)
            bound = (levels[i], levels[i + 1], self.relaxed, self.prices)
            if not run_bound_kernel.stages_used(*bound, tally, k, k == self.top):
                break
        return used


@final
class _Cuts:
    """Cutting planes of a concave function of prices, and the next prices to try."""

    def __init__(self, seconds: Seconds, radius: float, most: Seconds) -> None:
        """Start without cuts.

        Args:
            seconds: A stage's seconds by run: prices are counted in them.
            radius: How far the first step may go, so counted.
            most: The highest prices, so counted.
        """
        self.seconds, self.most = seconds, most
        self.center: Seconds = seconds
        self.bound, self.promise, self.radius = -math.inf, math.inf, radius
        self.rows: list[tuple[float, Seconds]] = []

    def next(self, prices: Seconds, bound: float, missing: Seconds) -> Seconds | None:
        """Add a cut, and maximise what the cuts allow within a box.

        Args:
            prices: Where the function was evaluated.
            bound: Its value.
            missing: A supergradient.
        """
        if bound > self.bound:
            self.bound, self.center = bound, prices.copy()
            self.radius *= 1.5
        else:
            self.radius *= 0.6
        # In multiples of each run's seconds, so that prices are of one size.
        self.rows.append((bound - float(missing @ prices), missing * self.seconds))
        found = _maximum(self.rows, self._box())
        if found is None:
            return None
        value, worth = found
        self.promise = value - self.bound
        return worth * self.seconds

    def _box(self) -> tuple[Seconds, Seconds]:
        middle = self.center / self.seconds
        reach = self.radius * (1 + middle / 4)
        return np.maximum(middle - reach, 0), np.minimum(middle + reach, self.most)


def _maximum(
    rows: list[tuple[float, Seconds]], box: tuple[Seconds, Seconds]
) -> tuple[float, Seconds] | None:
    """Maximise the least of affine functions over a box, by linear programming."""
    import highspy

    low, high = box
    count = len(low)
    solver = quiet_highs()
    infinity = solver.getInfinity()
    for lower, upper in zip(low, high, strict=True):
        solver.addVar(float(lower), float(max(lower, upper)))
    solver.addVar(-infinity, infinity)
    solver.changeColCost(count, -1.0)
    index = np.arange(count + 1, dtype=np.int32)
    for constant, slope in rows:
        solver.addRow(-infinity, constant, count + 1, index, np.append(-slope, 1.0))
    solver.run()
    if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return None
    found = np.array(solver.getSolution().col_value)
    return float(found[-1]), found[:-1]


def _relaxed(runs: Runs, unit: int) -> Relaxed:
    from . import lower_bound_kernel as run_bound_kernel

    slots = run_slots(runs, unit, "down")
    number = len(runs)
    sweep = np.zeros((number, number, number + 1), dtype=np.int64)
    for a in range(number):
        sweep[a, a] = slots.alone[a]
        for c in range(a + 1, number):
            sweep[a, c] = slots.cross[a, c, :, 0, 0]
    keep, tape = runs.state / unit, runs.tape / unit
    small = (runs.count > 1) & (runs.state > 0) & (keep < _SMALL) & (runs.state % unit != 0)
    return run_bound_kernel.Relaxed(
        stages=slots.stages,
        seconds=slots.seconds,
        keep=slots.keep,
        tape=slots.tape,
        taped=slots.taped,
        sweep=sweep,
        turn=slots.turn,
        keep_part=np.where(small, keep, 0.0),
        tape_part=np.where(small, tape, 0.0),
    )
