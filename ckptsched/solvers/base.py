"""What every solver is: a pure function from a chain and a budget to a schedule."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import final

from ..base.budget import exact_bytes
from ..base.errors import InfeasibleBudgetError
from ..schedule.language import Backward, Forward, Schedule
from ..schedule.trace import Trace
from ..workload.chain import Chain
from ..workload.graph import Graph


@final
@dataclass(frozen=True, kw_only=True)
class Solution:
    """A schedule that fits, and what the solver knows about it."""

    schedule: Schedule
    """The schedule; simulated, its peak is within the budget in exact bytes."""
    trace: Trace
    """Its simulation."""
    schedule_class: str
    """Name of the class of schedules that the bound holds for."""
    lower_bound_seconds: float
    """No schedule of the class that fits the budget takes less."""
    least_budget_bytes: int
    """Least budget for which the solver finds a schedule."""
    rounding_unit_bytes: int = 1
    """Sizes were rounded to multiples of this; 1 or their common divisor where exact."""
    seen: tuple[Schedule, ...] = field(default=(), repr=False, compare=False)
    """Schedules that were simulated on the way, whichever budgets they fit: each takes less time
    than all of them that take fewer bytes."""


class AbstractSolver(abc.ABC):
    """One method of planning. Solvers are pure: no clock, no printing, no global state."""

    name: str
    """The name by which users ask for it."""

    def solve(self, chain: Chain, budget_bytes: int) -> Solution:
        """Find the cheapest schedule of the solver's class within a budget.

        Args:
            chain: The chain to plan.
            budget_bytes: Bytes that the simulated peak may reach.

        Returns:
            A schedule whose simulated peak is at most the budget.

        Raises:
            InfeasibleBudgetError: Nothing of the class fits; the message names the least
                budget that does and the stage that binds.
            WorkloadError: The solver does not take such a chain.
        """
        return _only(self.solve_each(chain, [budget_bytes]))

    @abc.abstractmethod
    def solve_each(
        self, chain: Chain, budgets: Sequence[int]
    ) -> list[Solution | InfeasibleBudgetError]:
        """Solve for several budgets, with as much shared between them as can be.

        Args:
            chain: The chain to plan.
            budgets: Bytes, in any order.

        Returns:
            A solution, or why there is none, for each budget.

        Raises:
            WorkloadError: The solver does not take such a chain.
        """


class AbstractGraphSolver(AbstractSolver):
    """One that takes graphs as well as chains."""

    def solve(self, chain: Chain | Graph, budget_bytes: int) -> Solution:
        """As `AbstractSolver.solve`, of a chain or a graph.

        Raises:
            SolverTimeoutError: A limit of time ended before a schedule was found.
        """
        return _only(self.solve_each(chain, [budget_bytes]))

    @abc.abstractmethod
    def solve_each(
        self, chain: Chain | Graph, budgets: Sequence[int]
    ) -> list[Solution | InfeasibleBudgetError]:
        """As `AbstractSolver.solve_each`, of a chain or a graph."""


def _only(results: Sequence[Solution | InfeasibleBudgetError]) -> Solution:
    (result,) = results
    if isinstance(result, InfeasibleBudgetError):
        raise result
    return result


def each_of(
    budgets: Sequence[int], solve: Callable[[int], Solution]
) -> list[Solution | InfeasibleBudgetError]:
    """A solution, or why there is none, for each budget.

    Args:
        budgets: Bytes, in any order.
        solve: Finds a solution for one of them, or raises.
    """
    results: list[Solution | InfeasibleBudgetError] = []
    for budget in budgets:
        try:
            results.append(solve(budget))
        except InfeasibleBudgetError as error:
            results.append(error)
    return results


def infeasible(
    chain: Chain | Graph, budget_bytes: int, least: Trace, what: str
) -> InfeasibleBudgetError:
    """The error for a budget below the least that works.

    Args:
        chain: The chain or graph.
        budget_bytes: What was asked for.
        least: Simulation of the schedule of least peak.
        what: Name of the solver or class, for the message.
    """
    doing, stage = _words_of(chain, least.peak_operation)
    return InfeasibleBudgetError(
        f"no {what} schedule fits a budget of {exact_bytes(budget_bytes, budget=True)}; "
        f"the least that works is {exact_bytes(least.peak_bytes)}, limited by {doing}",
        budget_bytes=budget_bytes,
        least_budget_bytes=least.peak_bytes,
        stage=stage,
    )


def _words_of(chain: Chain | Graph, operation: str) -> tuple[str, str]:
    """An operation in plain words, such as "the backward of stage 1 ('0')", and its stage's name.

    Args:
        chain: The chain or graph.
        operation: As the schedule language writes it.
    """
    if operation == "turn":
        return "the loss", "the loss"
    parse = chain.parse_schedule if isinstance(chain, Graph) else Schedule.from_text
    schedule = parse(operation)
    number = int(schedule.stages[0])
    if not number:
        return "the input", "the input"
    name = chain.stage_name(number)
    place = f"stage {number}" + (f" ({name!r})" if name not in ("", f"stage {number}") else "")
    match schedule[0]:
        case Forward(_, tape, _):
            doing = "the forward, kept for its backward, of" if tape else "the forward of"
        case Backward():
            doing = "the backward of"
        case _:  # a Drop or Copy
            doing = "the output of"
    return f"{doing} {place}", name
