"""Binomial checkpointing of uniform chains, from the closed form.

Reference: Griewank and Walther, Algorithm 799: revolve, ACM TOMS 26(1), 2000. There s counts
the states that are kept at once, the input included, and t(l, s) the runs without tape of l
stages; each stage is run with tape once more, so a schedule has t(n, s) + n forward runs. (For
instance 25 for n = 10 and s = 3. Others count t alone, or leave the input out of s.)
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import final

import numpy as np

from ...base.errors import InfeasibleBudgetError, SolverRefusalError
from ...base.jit import suited
from ...schedule.language import Schedule
from ...schedule.trace import Trace
from ...simulator.simulator import simulate
from ...workload.chain import Chain
from ..base import AbstractSolver, Solution, each_of, infeasible
from .revolve_kernel import write_out

# Schedules with more runs without tape are not made: 16 million operations take 130 MB, and a
# second to simulate. 100,000 stages need three states then, 4,000 stages one.
MOST_ADVANCES = 8_000_000
# With a ledger an operation takes ten times as long: 1,000 stages need two states then, 8,000 five.
# The second number is for each stage.
_MOST_ADVANCES_OF_LEDGER = (100_000, 4)
# While the most states that fit are looked for, the peak of a schedule with more runs than this
# is that of a shorter chain, or with a ledger inferred from that of one with more states: each
# state fewer saves its bytes. The schedule chosen is always simulated, and with a ledger that of
# the fewest states, which gives the least budget.
_SIMULATED_ADVANCES = 100_000
# Steps of the interpreter for an operation of a schedule.
_STEPS = 10
# What the lower bound holds for: schedules that keep several tapes may take less.
_CLASS = "binomial (states and one tape)"


def _beta(s: int, r: int) -> int:
    """beta(s, r) = (s + r)! / (s! r!): stages that s states reverse with r runs of each."""
    return math.comb(s + r, s) if r >= 0 and s >= 0 else 0


def repetitions(stages: int, states: int) -> int:
    """The unique r with beta(s, r - 1) < l <= beta(s, r): how often a stage is run at most.

    Args:
        stages: Length l of the chain, at least 1.
        states: States s kept at once, the input included, at least 1.
    """
    low, high = 0, 1
    while _beta(states, high) < stages:
        low, high = high, 2 * high
    while low < high:
        middle = (low + high) // 2
        if _beta(states, middle) < stages:
            low = middle + 1
        else:
            high = middle
    return low


def advances(stages: int, states: int) -> int:
    """Least runs without tape that reverse a chain: t(l, s) = r l - beta(s + 1, r - 1).

    Args:
        stages: Length l of the chain, at least 1.
        states: States s kept at once, the input included, at least 1.

    Returns:
        Runs; the l runs with tape come on top.

    Reference: Griewank and Walther 2000, equation (2).
    """
    states = min(states, stages)
    r = repetitions(stages, states)
    return r * stages - _beta(states + 1, r - 1)


def first_advance(stages: int, states: int) -> int:
    """Stages to run before the first state beside the input is kept.

    Args:
        stages: Length l of the chain, at least 2.
        states: States s kept at once, the input included, at least 1.

    Returns:
        A split i that minimises i + t(i, s) + t(l - i, s - 1).

    Reference: Griewank and Walther 2000, the rule of page 34.
    """
    s = min(states, stages - 1)
    if s == 1:
        return stages - 1
    if s == stages - 1:
        return 1
    r = repetitions(stages, s)
    a, b = _beta(s, r - 1), _beta(s - 2, r - 1)
    if stages <= a + b:
        return _beta(s, r - 2)
    c = _beta(s - 1, r - 1)
    return stages - c - b if stages < a + b + c else a


def revolve_schedule(stages: int, states: int) -> Schedule:
    """The binomial schedule, in O(t(l, s)) and without recursion.

    Args:
        stages: Length l of the chain, at least 1.
        states: States s kept at once, the input included, at least 1.
    """
    packed = np.empty(2 * (advances(stages, states) + stages + 1), dtype=np.int64)
    suited(write_out, _STEPS * len(packed))(stages, states, packed)
    return Schedule(packed)


@final
@dataclass(eq=False)
class _Trials:
    """Schedules of one chain by their number of states, simulated."""

    chain: Chain
    runs: dict[int, tuple[Schedule, Trace]] = field(default_factory=dict)
    peaks: dict[int, int] = field(default_factory=dict)

    def run(self, states: int) -> tuple[Schedule, Trace]:
        """The schedule and its simulation."""
        if states not in self.runs:
            schedule = revolve_schedule(len(self.chain), states)
            self.runs[states] = schedule, simulate(self.chain, schedule)
        return self.runs[states]

    @functools.cached_property
    def fewest(self) -> int:
        """Fewest states whose schedule is not too long to be made."""
        if self.chain.has_ledger:
            least, per_stage = _MOST_ADVANCES_OF_LEDGER
            return self._fewest_with(max(least, per_stage * len(self.chain)))
        return self._fewest_with(MOST_ADVANCES)

    @functools.cached_property
    def _reference(self) -> int:
        """Fewest states whose schedule is soon simulated."""
        return self._fewest_with(_SIMULATED_ADVANCES)

    def _fewest_with(self, most: int) -> int:
        n = len(self.chain)
        numbers = range(1, n)  # advances falls as states grow, to n - 1 at n - 1 and at n
        found = bisect_left(numbers, -most, key=lambda s: -advances(n, s)) + 1
        return min(found, max(n - 1, 1))

    @property
    def _state_bytes(self) -> int:
        """What one more state takes."""
        stage, chain = self.chain.stages[0], self.chain
        if chain.has_ledger and stage.ledger is not None:
            return stage.ledger.state_bytes + chain.random_state_bytes
        return stage.state_bytes

    def peak(self, states: int) -> int:
        """Peak with so many states, without simulating what takes long."""
        if states in self.runs or states >= self._reference:
            return self.run(states)[1].peak_bytes
        if not self.chain.has_ledger:
            return self._saturated_peak(states)
        missing = self._reference - states
        return self.run(self._reference)[1].peak_bytes - missing * self._state_bytes

    def _saturated_peak(self, states: int) -> int:
        """Peak with so many states, of a chain that is no longer than its peak depends on.

        What is stored is at most so many states, a tape, a gradient, and in a sweep another state.
        Longer chains add nothing once all states are in use where three stages are left, so that a
        sweep of two is needed: (states + 1) (states + 2) / 2 stages are reversed without that.
        """
        if states not in self.peaks:
            length = min(len(self.chain), (states + 2) * (states + 3))
            short = replace(self.chain, stages=self.chain.stages[-length:], blocks=())
            trace = simulate(short, revolve_schedule(length, states))
            self.peaks[states] = trace.peak_bytes
        return self.peaks[states]

    def most(self, budget_bytes: int) -> int:
        """Most states whose simulated peak is within the budget; the fewest if none is."""
        low = self.fewest
        reference, size, n = self._reference, self._state_bytes, len(self.chain)
        spare = budget_bytes - self.peak(reference)
        states = n if not size else min(max(reference + spare // size, low), n)
        while states < n and self.peak(states + 1) <= budget_bytes:
            states += 1
        while states > low and self.peak(states) > budget_bytes:
            states -= 1
        while states > low and self.run(states)[1].peak_bytes > budget_bytes:
            states -= 1
        return states


@final
@dataclass(frozen=True)
class Revolve(AbstractSolver):
    """Optimal in runs among schedules that keep states and one tape at a time.

    For uniform chains, of any length. Keeps as many states as fit the budget. Where tapes are
    not much larger than states, keeping tapes as well (`chain_dp`) takes fewer runs.
    """

    name = "revolve"

    def solve_each(
        self, chain: Chain, budgets: Sequence[int]
    ) -> list[Solution | InfeasibleBudgetError]:
        """Find the binomial schedule with the most states that fits each budget.

        Raises:
            WorkloadError: The chain is not uniform.
        """
        if not chain.is_uniform:
            raise SolverRefusalError(
                "revolve needs stages of equal seconds and bytes; for others use chain_dp"
            )
        trials = _Trials(chain)
        return each_of(budgets, lambda budget: self._solve(trials, budget))

    def _solve(self, trials: _Trials, budget_bytes: int) -> Solution:
        chain = trials.chain
        schedule, trace = trials.run(trials.most(budget_bytes))
        if trace.peak_bytes > budget_bytes:
            raise infeasible(chain, budget_bytes, trace, "binomial")
        least = trials.peak(trials.fewest)
        if chain.has_ledger:
            least = trials.run(trials.fewest)[1].peak_bytes
        return Solution(
            schedule=schedule,
            trace=trace,
            schedule_class=_CLASS,
            lower_bound_seconds=trace.seconds,
            least_budget_bytes=min(least, trace.peak_bytes),
        )
