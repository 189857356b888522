"""The best of all pinned schedules of a small chain, or a proof of how good a schedule is.

Pinned: a tape keeps the state that it was made from, as autograd does. That is the only
restriction; states may be dropped and made again at any time. docs/theory.md says precisely what
the class is, and why the search may leave out what it leaves out.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import final

import numpy as np

from ..budget import exact_bytes
from ..errors import InfeasibleBudgetError, SolverRefusalError, WorkloadError
from ..schedule import Schedule, ScheduleBuilder
from ..simulator import simulate
from ..workload import Chain
from .base import AbstractSolver, Solution
from .chain_dp import ChainDp
from .pinned_bound import least_pinned_bytes, pinned_lower_bounds, pinned_table
from .pinned_least import LeastSearch
from .pinned_moves import NEXT_BITS, NEXT_MASK, key_width, tapes_beside_states
from .pinned_sizes import PinnedSizes, are_runs_fastest, pinned_sizes
from .pinned_space import PinnedSearch, Problem

ALL_PINNED = "all pinned schedules"
"""Name of the class in certificates."""
ALL = "all schedules"
"""Name of the class of which storing everything is the fastest."""
MOST_POSITIONS = 4_000_000
"""By default a search gives up at so many positions: some 250 MB."""
# Sums of the same seconds in another order differ by less.
_ROUNDING = 1e-12


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class AllPinned:
    """What is known about all pinned schedules within a budget."""

    lower_bound_seconds: float
    """No schedule of the class takes less; infinite where none fits."""
    schedule: Schedule | None
    """A schedule that takes less than the one that was known; None where none was found."""
    schedule_class: str
    """The class that the bound holds for."""
    is_closed: bool
    """Whether the bound is reached: by `schedule`, or else by the one that was known."""


def certify_all(
    chain: Chain,
    budget_bytes: int,
    best_seconds: float = math.inf,
    *,
    most_positions: int = MOST_POSITIONS,
) -> AllPinned:
    """Close the gap between the best known schedule and all pinned ones, as far as limits allow.

    First by the recurrence of `pinned_table`, which often suffices, whatever the length; then,
    where a position fits 64 bits (28 stages with one tape each), by a search. The sizes of the
    planning model bound those of a ledger from above, so that for a chain with a ledger they
    prove nothing: there the bound is the seconds of storing everything.

    Args:
        chain: The chain.
        budget_bytes: Bytes that a schedule may use.
        best_seconds: Seconds of a schedule that fits; infinite where none is known.
        most_positions: Where the search gives up, with the bound that is proven by then.

    Returns:
        A lower bound, and a better schedule where there is one.
    """
    base = chain.store_all_seconds
    if chain.has_ledger or best_seconds <= base * (1 + _ROUNDING):
        closed = best_seconds <= base * (1 + _ROUNDING)
        bound = min(base, best_seconds)
        return AllPinned(
            lower_bound_seconds=bound, schedule=None, schedule_class=ALL, is_closed=closed
        )
    (bound,) = pinned_lower_bounds(chain, [budget_bytes])
    closed = bound >= best_seconds * (1 - _ROUNDING) or math.isinf(bound)
    schedule = None
    sizes = pinned_sizes(chain)
    if not closed and _is_searchable(sizes):
        search = _search(sizes, budget_bytes, best_seconds, most_positions)
        path = search.run()
        closed = search.is_complete
        exhausted = closed and path is None  # nothing is cheaper, but for last digits
        bound = best_seconds if exhausted else max(bound, search.lower_bound_seconds)
        schedule = None if path is None else lower(sizes, path)
    return AllPinned(
        lower_bound_seconds=min(bound, best_seconds),
        schedule=schedule,
        schedule_class=ALL_PINNED,
        is_closed=closed,
    )


@final
@dataclass(frozen=True)
class ExactSearch(AbstractSolver):
    """Optimal among all pinned schedules of the planning model, for some 14 stages.

    Best-first, among what may beat the best memory-persistent schedule. Where `most_positions`
    is reached, the solution is the best schedule known, with the bound proven by then.

    A chain with a ledger is searched with the planning model's sizes. They bound the ledger's
    from above, so the schedule fits; but there may be cheaper ones that fit the ledger alone.
    So the class named is that of all schedules, and the bound is what storing everything takes.
    """

    most_positions: int = MOST_POSITIONS
    """Where to give up; a position takes some 60 bytes, and a few microseconds."""

    name = "exact_search"

    def __post_init__(self) -> None:
        """Refuse a search that cannot start."""
        if self.most_positions < 1:
            raise WorkloadError(
                f"exact_search needs at least one position, found {self.most_positions}"
            )

    def solve(self, chain: Chain, budget_bytes: int) -> Solution:
        """Find the cheapest pinned schedule within a budget.

        Raises:
            InfeasibleBudgetError: No pinned schedule fits, or none was found.
            WorkloadError: The chain is too long for a position of 64 bits.
        """
        sizes = pinned_sizes(chain)
        if not _is_searchable(sizes):
            raise SolverRefusalError(
                f"exact_search takes chains of 28 stages at most, and fewer where they offer "
                f"several tapes, none of which may be made in less than the state; found "
                f"{len(chain)} stages. Use chain_dp or beyond_persistent"
            )
        known: Solution | InfeasibleBudgetError
        (known,) = ChainDp().solve_each(chain, [budget_bytes])
        best = known.trace.seconds if isinstance(known, Solution) else math.inf
        found = self._find(chain, sizes, budget_bytes, best)
        schedule = found.schedule
        if schedule is None:
            if isinstance(known, InfeasibleBudgetError):
                raise self._infeasible(chain, sizes, known, proven=found.is_closed)
            schedule = known.schedule
        trace = simulate(chain, schedule)
        assert trace.peak_bytes <= budget_bytes, "the search and the simulator disagree"
        least = known.least_budget_bytes
        return Solution(
            schedule=schedule,
            trace=trace,
            schedule_class=found.schedule_class,
            lower_bound_seconds=min(found.lower_bound_seconds, trace.seconds),
            least_budget_bytes=self._least(chain, sizes, budget_bytes, least),
        )

    def _find(self, chain: Chain, sizes: PinnedSizes, budget: int, best: float) -> AllPinned:
        if not chain.has_ledger:
            return certify_all(chain, budget, best, most_positions=self.most_positions)
        path = _search(sizes, budget, best, self.most_positions).run()
        return AllPinned(
            lower_bound_seconds=chain.store_all_seconds,
            schedule=None if path is None else lower(sizes, path),
            schedule_class=ALL,
            is_closed=False,
        )

    def _least(self, chain: Chain, sizes: PinnedSizes, feasible: int, known: int | None) -> int:
        """The least budget that some pinned schedule keeps, as far as a search can tell."""
        most = feasible if known is None else min(feasible, known)
        if chain.has_ledger:
            return most
        least = min(most, least_pinned_bytes(sizes))
        return LeastSearch(sizes, least, most, self.most_positions).run()

    def _infeasible(
        self, chain: Chain, sizes: PinnedSizes, known: InfeasibleBudgetError, *, proven: bool
    ) -> InfeasibleBudgetError:
        """The error, with the least budget of the class rather than the persistent one."""
        least = known.least_budget_bytes
        if least is not None:
            least = self._least(chain, sizes, least, least)
        found = "fits" if proven else "was found for"
        works = "unknown" if least is None else exact_bytes(least)
        return InfeasibleBudgetError(
            f"no pinned schedule {found} a budget of "
            f"{exact_bytes(known.budget_bytes, budget=True)}; "
            f"the least that works is {works}",
            budget_bytes=known.budget_bytes,
            least_budget_bytes=least,
        )


def _is_searchable(sizes: PinnedSizes) -> bool:
    """Whether a position fits 64 bits, and no tape is worth making for its state alone."""
    return key_width(sizes) is not None and are_runs_fastest(sizes)


def _search(
    sizes: PinnedSizes, budget_bytes: int, upper_seconds: float, most_positions: int
) -> PinnedSearch:
    width = key_width(sizes)
    assert width is not None, "the caller has asked before"
    free = budget_bytes - sizes.fixed
    # Nothing beside the segments: restricted to the runs of its own stages, any schedule is one
    # of the segment alone (docs/theory.md, lemma 2).
    table = pinned_table(sizes, max(free, 0), level=np.zeros_like(sizes.level))
    problem = Problem(
        sizes=sizes,
        rows=table.rows,
        offset=table.offset,
        unit=table.unit,
        base=np.cumsum(sizes.base_seconds),
        beside=tapes_beside_states(sizes),
        budget=free,
        width=width,
    )
    return PinnedSearch(problem, upper_seconds * (1 - _ROUNDING), most_positions)


def lower(sizes: PinnedSizes, path: list[int]) -> Schedule:
    """Write out the operations between the positions of a search.

    Args:
        sizes: The chain's sizes.
        path: Positions from the start to the end, as `PinnedSearch.run` gives them.
    """
    width = key_width(sizes)
    assert width is not None, "the search had a width"
    n = len(sizes.state) - 1
    build = ScheduleBuilder()
    for before, after in itertools.pairwise(path):
        b = before & NEXT_MASK
        changed = (before ^ after) >> NEXT_BITS
        if after & NEXT_MASK < b:
            build.turn() if b == n + 1 else build.backward(b)
            _drop_state(build, before, b - 1, width)
            continue
        i = (changed.bit_length() - 1) // width + 1
        old, new = _field(before, i, width), _field(after, i, width)
        if old & 1 and not new & 1:
            build.drop_state(i)
        if new & 1 and not old & 1:
            build.forward(i)
        if new >> 1:
            build.tape(i, (new >> 1) - 1)
    build.drop_state(0)
    return build.build()


def _drop_state(build: ScheduleBuilder, key: int, i: int, width: int) -> None:
    """Drop state i, which nothing reads any more, if it was kept."""
    if i and _field(key, i, width) & 1:
        build.drop_state(i)


def _field(key: int, i: int, width: int) -> int:
    return (key >> (NEXT_BITS + (i - 1) * width)) & ((1 << width) - 1)
