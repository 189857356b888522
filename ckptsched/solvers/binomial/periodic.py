"""Binomial checkpointing of long periodic chains, such as the slopes of a thousand equal steps.

A period of a few unequal stages is a unit; units are equal, so that the closed form of `revolve`
says which of their inputs are kept. What it calls the run with tape and the backward of a unit is
here one of several ways to go back through its stages: with all their tapes at once, which is
fastest, or with one tape at a time and so many of the states between them. The last units are all
taped in the forward pass, as many as the budget leaves room for.

Reference: the schedule of units, and of stages within one, is that of Griewank and Walther,
Algorithm 799: revolve, ACM TOMS 26(1), 2000. One schedule within another is how Herrmann and
Pallez, H-Revolve, ACM TOMS 46(2), 2020, use levels of storage.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import final

from ...base.errors import InfeasibleBudgetError, SolverRefusalError
from ...schedule.language import Code, Schedule, ScheduleBuilder
from ...schedule.trace import Trace
from ...simulator.simulator import simulate
from ...workload.chain import Chain
from ..base import AbstractSolver, Solution, each_of, infeasible
from .revolve import advances, revolve_schedule

_CLASS = "binomial over periods"
_LONGEST_PERIOD = 64
_FEWEST_UNITS = 4
# Schedules with more runs of stages are not made: they take seconds to simulate.
_MOST_RUNS, _MOST_RUNS_OF_STAGE = 200_000, 20
# So many numbers of states are compared where tapes take the place of states.
_PARTS = 6


@final
@dataclass(frozen=True, slots=True)
class Periods:
    """A chain of units, each a period; what comes before the first whole one belongs to it."""

    lasts: tuple[int, ...]
    """Last stage of each unit; 0 first."""

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.lasts) - 1

    @property
    def longest(self) -> int:
        """Stages of the longest unit."""
        return max(b - a for a, b in zip(self.lasts, self.lasts[1:], strict=False))


def find_periods(chain: Chain) -> Periods | None:
    """The shortest period of a chain's stages; its first and last unit may differ.

    Args:
        chain: Any chain.

    Returns:
        None where there is none of up to 64 stages, and of at least two.
    """
    n, stages = len(chain), chain.stages
    for period in range(2, min(_LONGEST_PERIOD, n // _FEWEST_UNITS) + 1):
        inner = range(period + n % period, n - 2 * period)
        if all(_equal(stages[i], stages[i + period]) for i in inner):
            firsts = range(n % period, n + 1, period)
            lasts = tuple(firsts) if not n % period else (0, *firsts[1:])
            return Periods(lasts)
    return None


def _equal(one: object, other: object) -> bool:
    return one is other or one == other


@final
@dataclass(frozen=True, slots=True)
class _Shape:
    """One schedule of the class."""

    states: int
    """Inputs of units that are kept at once, that of the chain included."""
    inner: int
    """States that are kept at once within a unit; 0 for all its tapes."""
    taped: int
    """Units at the end that are taped in the forward pass."""


@final
@dataclass(frozen=True)
class Periodic(AbstractSolver):
    """For long chains that repeat a few unequal stages, of which `chain_dp` would take long.

    On chains that both take it costs a few percent more near the least budget, and one or two
    percent more elsewhere.
    """

    name = "periodic"

    def solve_each(
        self, chain: Chain, budgets: Sequence[int]
    ) -> list[Solution | InfeasibleBudgetError]:
        """Find the fastest schedule of the class that fits each budget.

        Raises:
            WorkloadError: The chain has no period.
        """
        periods = find_periods(chain)
        if periods is None:
            raise SolverRefusalError(
                f"periodic needs stages that repeat after at most {_LONGEST_PERIOD}; for others "
                "use chain_dp"
            )
        trials = _Trials(chain, periods)
        return each_of(budgets, lambda budget: self._solve(trials, budget))

    def _solve(self, trials: _Trials, budget_bytes: int) -> Solution:
        chain, least = trials.chain, trials.run(trials.smallest)[1]
        if least.peak_bytes > budget_bytes:
            raise infeasible(chain, budget_bytes, least, "periodic")
        fitting = [trials.run(shape) for shape in trials.fitting(budget_bytes)]
        schedule, trace = min(fitting, key=lambda run: run[1].seconds)
        return Solution(
            schedule=schedule,
            trace=trace,
            schedule_class=_CLASS,
            lower_bound_seconds=chain.store_all_seconds,
            least_budget_bytes=min(least.peak_bytes, trace.peak_bytes),
        )


@final
@dataclass(eq=False)
class _Trials:
    """Schedules of one chain by their shape, simulated."""

    chain: Chain
    periods: Periods
    runs: dict[_Shape, tuple[Schedule, Trace]] = field(default_factory=dict)

    @property
    def smallest(self) -> _Shape:
        """The shape that needs least bytes."""
        return self._shape(1, 1, 1)

    def run(self, shape: _Shape) -> tuple[Schedule, Trace]:
        """The schedule and its simulation."""
        if shape not in self.runs:
            schedule = _write(self.periods, shape)
            self.runs[shape] = schedule, simulate(self.chain, schedule)
        return self.runs[shape]

    def fitting(self, budget: int) -> Iterator[_Shape]:
        """Shapes worth comparing: for each way to go back through a unit the most states.

        With all tapes of a unit also fewer states, and more units that are taped in the forward.
        """
        longest, units = self.periods.longest, self.periods.units

        def fits(states: int, inner: int, taped: int) -> bool:
            return self.run(self._shape(states, inner, taped))[1].peak_bytes <= budget

        for inner in sorted({0, longest, longest // 2, 2, 1}):
            if inner > longest or not fits(1, inner, 1):
                continue
            most = _most(1, units, functools.partial(fits, inner=inner, taped=1))
            yield self._shape(most, inner, 1)
            if inner:
                continue
            for states in sorted({1 + most * part // _PARTS for part in range(_PARTS)}):
                taped = _most(1, units, functools.partial(fits, states, 0))
                yield self._shape(states, 0, taped)

    def _shape(self, states: int, inner: int, taped: int) -> _Shape:
        """The shape with so many states, or as many as a schedule of bearable length needs."""
        return _Shape(max(states, self._fewest(inner, taped)), inner, taped)

    def _fewest(self, inner: int, taped: int) -> int:
        """Fewest states whose schedule is of bearable length."""
        units, period = self.periods.units - taped + 1, self.periods.longest
        within = units * advances(period, inner) if inner else 0
        most = max(_MOST_RUNS, _MOST_RUNS_OF_STAGE * len(self.chain)) - within
        if advances(units, 1) * period <= most:
            return 1
        return 1 + _most(1, units, lambda states: advances(units, states) * period > most)


def _most(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The largest number up to which a condition holds; `low` where it never does."""
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _write(periods: Periods, shape: _Shape) -> Schedule:
    """The schedule of a shape in stages."""
    lasts = (*periods.lasts[: periods.units - shape.taped + 1], periods.lasts[-1])
    units = len(lasts) - 1
    outer = revolve_schedule(units, shape.states)
    build = ScheduleBuilder()
    for code, unit in zip(outer.codes.tolist(), outer.stages.tolist(), strict=True):
        first, last = lasts[unit - 1] + 1, lasts[unit]
        if code == Code.FORWARD:
            build.sweep(first, last)
        elif code == Code.DROP:
            build.drop_state(last)
        elif code == Code.BACKWARD:
            is_last = unit == units
            if shape.inner == 0 or (is_last and shape.taped > 1):
                _with_all_tapes(build, first, last, turn=is_last)
            else:
                _with_one_tape(build, first, last, shape.inner, turn=is_last)
    return build.build()


def _with_all_tapes(build: ScheduleBuilder, first: int, last: int, *, turn: bool) -> None:
    for stage in range(first, last + 1):
        build.tape(stage)
    if turn:
        build.turn()
    for stage in range(last, first - 1, -1):
        build.backward(stage)


def _with_one_tape(
    build: ScheduleBuilder, first: int, last: int, states: int, *, turn: bool
) -> None:
    """Go back from stage to stage; the state before the first is kept, and not dropped."""
    inner = revolve_schedule(last - first + 1, min(states, last - first + 1))
    for code, number in zip(inner.codes.tolist(), inner.stages.tolist(), strict=True):
        stage = first - 1 + number
        if code == Code.FORWARD:
            build.forward(stage)
        elif code == Code.TAPED_FORWARD:
            build.tape(stage)
        elif code == Code.BACKWARD:
            build.backward(stage)
        elif code == Code.DROP and number > 0:
            build.drop_state(stage)
        elif code == Code.TURN and turn:
            build.turn()
