"""Closes the question that a bound on a class of schedules leaves: is there a better one at all?"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from .budget import exact_bytes
from .errors import InfeasibleBudgetError, SolverTimeoutError, WorkloadError
from .graph import Graph
from .plans import Workload, excess
from .portfolio import ALL_SCHEDULES, Answer, Candidate, Found
from .simulator import simulate
from .solvers import BeyondPersistent, GraphIlp, Solution
from .solvers.exact_search import AllPinned, ExactSearch, certify_all
from .workload import Chain

# The integer program of a chain this long takes minutes; the exact search ends at some 28.
_ILP_STAGES = 40


def close(workload: Workload, size: int, found: Found, time_limit: float) -> Found:
    """Look for a better schedule outside the class that was searched, or prove that none is.

    Small chains are searched through, longer ones bounded by a recurrence that holds for all
    pinned schedules (`solvers.exact_search.certify_all`), and by the integer program where the
    search gives up. A graph is given to the integer program.

    Args:
        workload: A chain or graph.
        size: The budget in bytes.
        found: What is known: the best schedule, or why there is none.
        time_limit: Seconds that the integer program may take.

    Returns:
        The same, or something cheaper, with a bound for the wider class; where nothing fits,
        the error names the least budget of all pinned schedules too, if it is known.
    """
    if isinstance(workload, Graph) and workload.is_path:
        workload = workload.to_chain()
    if isinstance(workload, Graph):
        if isinstance(found, InfeasibleBudgetError) or found.schedule_class == ALL_SCHEDULES:
            return _by_program(workload, size, found, time_limit)
        return found  # the program's bound already
    if isinstance(found, InfeasibleBudgetError):
        return _anything(workload, size, found)
    closed = certify_all(workload, size, found.best.seconds)
    answer = _with(workload, size, found, closed)
    if not closed.is_closed:
        answer = _sliding(workload, size, answer)
    if not (closed.is_closed or workload.has_ledger) and len(workload) <= _ILP_STAGES:
        better = _by_program(workload, size, answer, time_limit)
        if isinstance(better, Answer) and better.best is not answer.best:
            return replace(answer, best=better.best)
    return answer


def _with(chain: Chain, size: int, found: Answer, closed: AllPinned) -> Answer:
    """The answer with the wider bound, and the schedule where one was found."""
    best = found.best
    if closed.schedule is not None:
        trace = simulate(chain, closed.schedule)
        if trace.peak_bytes <= size and excess(best.seconds, trace.seconds) > 0:
            solution = Solution(
                schedule=closed.schedule,
                trace=trace,
                schedule_class=closed.schedule_class,
                lower_bound_seconds=closed.lower_bound_seconds,
                least_budget_bytes=min(found.least_budget_bytes, trace.peak_bytes),
            )
            best = Candidate(ExactSearch.name, solution)
    return replace(
        found,
        best=best,
        schedule_class=closed.schedule_class,
        # A bound that is reached is the best's seconds, but for their last digits.
        lower_bound_seconds=best.seconds
        if closed.is_closed
        else min(closed.lower_bound_seconds, best.seconds),
    )


def _sliding(chain: Chain, size: int, answer: Answer) -> Answer:
    """The answer, or a cheaper schedule whose checkpoints slide."""
    try:
        solution = BeyondPersistent().solve(chain, size)
    except (WorkloadError, InfeasibleBudgetError):
        return answer
    if excess(answer.best.seconds, solution.trace.seconds) == 0:
        return answer
    best = Candidate(BeyondPersistent.name, solution)
    bound = min(answer.lower_bound_seconds, best.seconds)
    return replace(answer, best=best, lower_bound_seconds=bound)


def _by_program(workload: Workload, size: int, found: Found, time_limit: float) -> Found:
    """What the integer program finds, if it is better or the only thing."""
    try:
        # A graph solver takes chains and graphs alike.
        solution = GraphIlp(time_limit_seconds=time_limit).solve(cast(Chain, workload), size)
    except (WorkloadError, SolverTimeoutError, InfeasibleBudgetError):
        return found
    if isinstance(found, Answer) and excess(found.best.seconds, solution.trace.seconds) == 0:
        best = found.best
    else:
        best = Candidate(GraphIlp.name, solution)
    least = solution.least_budget_bytes
    if isinstance(found, Answer):
        least = min(least, found.least_budget_bytes)
    return Answer(
        best=best,
        schedule_class=solution.schedule_class,
        lower_bound_seconds=min(solution.lower_bound_seconds, best.seconds),
        least_budget_bytes=least,
    )


def _anything(chain: Chain, size: int, found: InfeasibleBudgetError) -> Found:
    """A schedule where none of the class fits, or the least budget of all pinned ones."""
    if chain.has_ledger:
        return found  # the search knows the planning model's sizes only
    try:
        solution = ExactSearch().solve(chain, size)
    except WorkloadError:
        return found
    except InfeasibleBudgetError as error:
        least = error.least_budget_bytes
        if least is None:
            return found
        text = exact_bytes(least)
        return InfeasibleBudgetError(
            f"{found}; of all pinned schedules the least budget known is {text}",
            budget_bytes=found.budget_bytes,
            least_budget_bytes=min(least, found.least_budget_bytes or least),
            stage=found.stage,
        )
    return Answer(
        best=Candidate(ExactSearch.name, solution),
        schedule_class=solution.schedule_class,
        lower_bound_seconds=solution.lower_bound_seconds,
        least_budget_bytes=solution.least_budget_bytes,
    )
